"""What is made: every case. Sizes of one case differ from each other wherever the model lets them."""

from __future__ import annotations

from case import Case
from lora_cases import lora
from methods_cases import methods
from parameters_cases import parameters
from trained_cases import trained


def cases() -> list[Case]:
    """All, in the order in which they are made."""
    return [*lora(), *trained(), *parameters(), *methods()]
