"""A device beside the CPU, for machines that have none: `python tests/other_device.py FLAGS...` is train.py --device emu.

Tensors on "emu" compute with the CPU's kernels, but as on a GPU an operation whose tensors lie on two devices is an error
(copies, single numbers and indices aside). The world is test_train.py's miniature one. What this cannot show: bfloat16
(autocast casts nothing here), a GPU's own kernels, speed.
"""

import pathlib
import sys
from dataclasses import replace

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from rank import shrink

import model
import train

CPU = torch.device("cpu")
COPIES = ("to", "_to_copy")
MAY_MIX = ("copy_", "index", "index_put_", "_index_put_impl_", *COPIES)


class Emulated(torch.Tensor):
    """A tensor that says it is on the device and holds a CPU tensor, `held`."""

    @staticmethod
    def __new__(cls, held):
        how = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        how |= {"dtype": held.dtype, "requires_grad": held.requires_grad}
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, device="emu:0", **how
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    def tolist(self):
        return self.held.tolist()


class Device(TorchDispatchMode):
    """While this is on, factories make tensors on the device too."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation, args, kwargs):
    """Run one operation on the tensors held; what comes out is on the device if what went in was, or if it is sent there."""
    leaves = []
    held_args, held_kwargs = (each(held, x, leaves) for x in (args, kwargs))
    name = operation._schema.name.split("::")[1]
    on = any(isinstance(x, Emulated) for x in leaves)
    off = [x for x in leaves if type(x) in (torch.Tensor, torch.nn.Parameter)]
    if on and any(x.dim() for x in off) and name not in MAY_MIX:
        shapes = [tuple(x.shape) for x in off]
        raise RuntimeError(f"{operation}: tensors of shape {shapes} are on the CPU")
    devices = [x.type for x in leaves if isinstance(x, torch.device)]
    sent = "emu" in devices
    out = operation(*held_args, **held_kwargs)
    if name == "copy_":
        on = isinstance(args[0], Emulated)
    if not (sent or on and "cpu" not in devices):
        return args[0] if name == "copy_" else out
    out = each(lambda x: Emulated(x) if type(x) is torch.Tensor else x, out, [])
    if sent or name in COPIES:
        return out
    return return_and_correct_aliasing(operation, args, kwargs, out)


def each(change, x, leaves: list):
    """`x` with every leaf changed; the old ones are added to `leaves`. (torch's tree_map takes three times as long.)"""
    if isinstance(x, dict):
        return {name: each(change, y, leaves) for name, y in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(each(change, y, leaves) for y in x)
    leaves.append(x)
    return change(x)


def held(x):
    """What an operation of the CPU takes in place of x."""
    if isinstance(x, torch.device):
        return CPU
    return x.held if isinstance(x, Emulated) else x


def install() -> None:
    """Register the device and go round what torch cannot do with one that is made in Python."""
    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = list
    backend_registration._setup_privateuseone_for_python_backend("emu", module)
    tensor, load, save = torch.tensor, model.load_policy, model.save_policy

    def new_tensor(values, device=None, **how):
        """torch.tensor, which copies to the device without telling anyone."""
        if device is None or torch.device(device).type != "emu":
            return tensor(values, device=device, **how)
        return tensor(values, **how).to(device)

    def load_policy(*args):
        """transformers needs the real torch.tensor; embeddings shared with the head are copied to the device twice."""
        torch.tensor = tensor
        policy = load(*args)
        torch.tensor = new_tensor
        policy.model.tie_weights()
        return policy

    def save_policy(policy, folder):
        """Weights on the device have no address, by which transformers tells shared ones."""
        merged = model.plain_copy(policy.model, torch.float32)
        copy = type(merged)(merged.config)
        copy.load_state_dict({name: held(x) for name, x in merged.state_dict().items()})
        save(replace(policy, model=copy), folder)

    def mask(queries, keys):
        """causal_lower_right, whose class a dispatch mode cannot make."""
        ones = torch.ones(queries, keys, dtype=torch.bool, device="emu")
        return ones.tril(keys - queries)

    torch.tensor, model.causal_lower_right = new_tensor, mask
    model.Muon = (
        model.Float32Muon
    )  # torch's multiplies in bfloat16, emulated on many CPUs
    train.load_policy, train.save_policy = load_policy, save_policy


if __name__ == "__main__":
    install()
    shrink(setattr)
    with Device():
        train.main()
