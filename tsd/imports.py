"What the modules of tsd share: nothing but names, so that each notebook's import cell stays short."
import math, os, random, sys, warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
