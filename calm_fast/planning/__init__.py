"""What training a composition will cost, from the configs of its parts alone. docs/scaling.md."""

from calm_fast.planning.plan import plan as plan
from calm_fast.planning.report import lines as lines
