"""Full ranking, its metrics and their uncertainty.

`ranking` turns scores into ranks, `bootstrap` puts an interval round a mean over samples, `table`
keeps the ranks of every method and makes `metrics.json` of them, `cold` says which items train has
shown often, rarely or never, `lists` what the methods show.
"""

from rporec.evaluation.ranking import hit, ndcg, ranks

__all__ = ["hit", "ndcg", "ranks"]
