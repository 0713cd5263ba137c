"""Recommenders that read no rationale: the references every row of the table is held against."""

from rporec.baselines.popularity import Baseline, Popularity, RecentPopularity

__all__ = ["Baseline", "Popularity", "RecentPopularity"]
