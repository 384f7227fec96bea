"""`accelerate launch` with every choice made, so that no configuration of the machine's has a say."""

import sys
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[1]


def launch(script: str, processes: int = 1, precision: str = "no", gpu: bool | None = None) -> list[str]:
    """The beginning of a command line that runs a script of the repository's root.

    Args:
        processes: on the GPU's machine one for each GPU; on the CPU they share its threads.
        precision: `no`, `fp16` or `bf16`.
        gpu: None is whether there is one.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    line = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    line += ["--num_machines", "1", "--dynamo_backend", "no", "--mixed_precision", precision]
    if gpu:
        config = "one_gpu.yaml" if processes == 1 else "one_node.yaml"
        line += ["--config_file", str(ROOT / "configs" / config)]
    else:
        line += ["--cpu", "--num_cpu_threads_per_process", str(max(1, torch.get_num_threads() // processes))]
    return [*line, str(ROOT / script)]
