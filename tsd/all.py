"Everything a user of tsd needs: `from tsd.all import *`"
from fastai.callback.all import *
from fastai.learner import *
from fastai.metrics import accuracy, top_k_accuracy
from fastai.torch_core import set_seed

from .mhca import *
from .student import *
from .teachers import *
from .checkpoints import *
from .aligner import *
from .fpld import *
from .video import *
from .sampling import *
from .augment import *
from .annotations import *
from .frames import *
from .data import *
from .doctor import *
from .shards import *
from .tinyclips import *
from .distill import *
from .schedule import *
from .learner import *
from .resume import *
from .cache import *
from .finetune import *
from .training import *
from .distributed import *
from .evaluate import *
from .analysis import *
from .predict import *
from .export import *
from .cost import *
from .serve import *
from .plots import *
