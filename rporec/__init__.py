"""RPORec: a language model reasons about a user before it recommends.

The library: data, text, models, engines, rewards, losses, metrics. Pure functions and plain
classes; no Ray (that is `actors`), so that every line can be tested in a second.
"""

__version__ = "0.1.0"
