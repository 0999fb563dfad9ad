"""What a run's `config.json` has beside the fields of a configuration, and what older versions wrote into it."""

from collections.abc import Mapping
from typing import Any

OF_MACHINE = ("versions", "threads", "processes")  # what a run's config.json has beside the fields
RETIRED = {  # fields that older runs have: what they then were, and what became of the rest
    "attention": ("softmax", "was taken out, as it did not pay; the last commit that has it is 4c71044"),
}


def without_retired(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without fields that are no more.  Errors: ValueError where an older run is of what was taken out."""
    for key in RETIRED.keys() & values.keys():
        if values[key] != RETIRED[key][0]:
            raise ValueError(f"{key} {values[key]!r} {RETIRED[key][1]}")
    return {key: value for key, value in values.items() if key not in RETIRED}


def without_machine(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in a run's `config.json`, without what it says of the machine."""
    return {key: value for key, value in values.items() if key not in OF_MACHINE}
