import torch

from megarpt.device import mcore_cpu

if not torch.cuda.is_available():
    mcore_cpu.install()  # before the first import of megatron.core, as the command line does
