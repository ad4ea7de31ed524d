"What the modules of tsd share: names, so that each notebook's import cell stays short, and how an optional package is imported."
import math, os, random, sys, warnings
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

def import_optional(name, who, remedy):
    "The module `name`; a ValueError tells `who` needs its package, and the `remedy`, where it is not installed"
    try: return import_module(name)
    except ImportError as e: raise ValueError(f"{who} the package {name.split('.')[0]}, which is not installed: {remedy}") from e
