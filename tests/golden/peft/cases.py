"""What is made: every case. Sizes of one case differ from each other wherever the model lets them."""

from __future__ import annotations

from case import Case
from lora_cases import LORA
from methods_cases import METHODS
from modules_cases import MODULES
from parameters_cases import PARAMETERS
from trained_cases import TRAINED

CASES: tuple[Case, ...] = (*LORA, *MODULES, *TRAINED, *PARAMETERS, *METHODS)
