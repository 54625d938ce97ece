"""The program of a child process that reads the GPUs from NVML, the driver's own library, by its C interface.

It prints what ``nvidia-smi --query-gpu`` prints for the same fields. Functions and structures are those of NVML's
public header (nvml.h: nvmlInit_v2; nvmlDeviceGetMemoryInfo with total, free and used as 64-bit counts of bytes).
"""

from __future__ import annotations

__all__ = ["PROGRAM"]

PROGRAM = """
import ctypes as c, sys

def load():
    for name in sys.argv[1:] or ["libnvidia-ml.so.1", "/usr/lib/wsl/lib/libnvidia-ml.so.1"]:
        try:
            return c.CDLL(name)
        except OSError as error:
            problem = error
    sys.exit("the driver's library NVML cannot be loaded: %s" % problem)

class Memory(c.Structure):
    _fields_ = [("total", c.c_ulonglong), ("free", c.c_ulonglong), ("used", c.c_ulonglong)]

nvml = load()

def call(name, *arguments):
    status = getattr(nvml, name)(*arguments)
    if status:
        sys.exit("%s answers error %d" % (name, status))

def text(name, *handle):
    room = c.create_string_buffer(96)
    call(name, *handle, room, c.c_uint(96))
    return room.value.decode("utf-8", "replace")

call("nvmlInit_v2")
count, driver = c.c_uint(), text("nvmlSystemGetDriverVersion")
call("nvmlDeviceGetCount_v2", c.byref(count))
for index in range(count.value):
    handle, memory, major, minor = c.c_void_p(), Memory(), c.c_int(), c.c_int()
    call("nvmlDeviceGetHandleByIndex_v2", c.c_uint(index), c.byref(handle))
    call("nvmlDeviceGetMemoryInfo", handle, c.byref(memory))
    call("nvmlDeviceGetCudaComputeCapability", handle, c.byref(major), c.byref(minor))
    names = text("nvmlDeviceGetName", handle), text("nvmlDeviceGetUUID", handle)
    capability = "%d.%d" % (major.value, minor.value)
    print(index, *names, capability, memory.total >> 20, memory.free >> 20, driver, sep=", ")
"""
