"""Adapters in the format of HF peft: what both sides know is written and read, and nothing else is guessed.

A method says under which type HF peft has it (`Method.peft_type`). A type is a file beside this one, with a
subclass of `PeftForm`, and a line in the table below.
"""

from vimtune.exchange.peft.c3a import C3AForm
from vimtune.exchange.peft.form import PeftForm
from vimtune.exchange.peft.ia3 import IA3Form
from vimtune.exchange.peft.lora import LoRAForm
from vimtune.exchange.peft.oft import OFTForm
from vimtune.registry import Registry

FORMS: Registry[PeftForm] = Registry("type of HF peft")
"""The types by the name that HF peft gives them."""

FORMS.add("LORA", LoRAForm())
FORMS.add("IA3", IA3Form())
FORMS.add("OFT", OFTForm())
FORMS.add("C3A", C3AForm())
