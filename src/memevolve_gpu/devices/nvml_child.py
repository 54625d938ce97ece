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

def asked(name, *arguments):
    function = getattr(nvml, name, None)
    return -1 if function is None else function(*arguments)

def call(name, *arguments):
    status = asked(name, *arguments)
    if status:
        meaning = getattr(nvml, "nvmlErrorString", None)
        if meaning is not None:
            meaning.restype = c.c_char_p
            meaning = (meaning(c.c_int(status)) or b"").decode("ascii", "replace")
        sys.exit("%s answers error %d (%s)" % (name, status, meaning or "no explanation"))

def text(name, *handle):
    room = c.create_string_buffer(96)
    call(name, *handle, room, c.c_uint(96))
    return room.value.decode("ascii", "replace").replace(chr(0xFFFD), "?")

call("nvmlInit_v2")
count, driver, index = c.c_uint(), text("nvmlSystemGetDriverVersion"), 0
call("nvmlDeviceGetCount_v2", c.byref(count))
for place in range(count.value):
    handle, memory, sliced, coming = c.c_void_p(), Memory(), c.c_uint(), c.c_uint()
    major, minor = c.c_int(), c.c_int()
    if asked("nvmlDeviceGetHandleByIndex_v2", c.c_uint(place), c.byref(handle)):
        continue  # lost, or not for this container
    known = not asked("nvmlDeviceGetMemoryInfo", handle, c.byref(memory))
    sizes = (memory.total >> 20, memory.free >> 20) if known else ("[N/A]", "[N/A]")
    asked("nvmlDeviceGetCudaComputeCapability", handle, c.byref(major), c.byref(minor))
    asked("nvmlDeviceGetMigMode", handle, c.byref(sliced), c.byref(coming))
    names = text("nvmlDeviceGetName", handle), text("nvmlDeviceGetUUID", handle)
    capability, mode = "%d.%d" % (major.value, minor.value), ("Disabled", "Enabled")[sliced.value == 1]
    print(index, *names, capability, *sizes, mode, driver, sep=", ")
    index += 1
"""
