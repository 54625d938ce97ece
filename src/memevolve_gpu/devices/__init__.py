"""GPUs and memory of this machine: what is there, what works, and how much may be used.

Nothing here loads CUDA into this process; drivers and engines are tried in child processes with a time limit.

Where to find what:

* :mod:`.selection`: ``Machine``, which the rest of the package uses, and ``select_device`` for the setting DEVICE;
* :mod:`.gpu_probe`: the GPUs as the driver lists them and as CUDA numbers them;
* :mod:`.engine_probe`: whether torch or faiss works on a GPU;
* :mod:`.memory`: memory of the host (control groups included) and the memory budget of a device;
* :mod:`.subprocess_query`: a child process that can neither hang nor crash its caller.
"""
