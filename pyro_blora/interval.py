"""The interval of everything that is reported with one: central, 94 %, as usual in ArviZ."""

INTERVAL = (0.03, 0.97)  # probabilities below its ends
PERCENT = f"{INTERVAL[1] - INTERVAL[0]:.0%}".replace("%", " %")
