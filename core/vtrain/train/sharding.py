"""Training that is spread over processes: each keeps a share of the weights, their gradients and the optimizer's states.

torch's own `fully_shard` (FSDP2) on each block of the denoiser, and on the step around them for the rest: before a block runs its
weights are gathered, afterwards they are let go, and the backward pass leaves each process the mean of its share of the gradient.
The optimizer and all that goes by single numbers is given plain tensors, this process's shares; a checkpoint holds whole ones, so
that any number of processes, sharded or not, reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from vtrain.contract import Denoiser, Device
from vtrain.train.step import Step


class Shares:
    """What this process has of all that is trained. named: (name, its share), plain parameters, named as the whole ones. whole:
    name -> the parameter itself, a DTensor.

    Shares are cut along the first dimension, as torch.chunk cuts: the last processes may have a smaller one, or none of a weight
    that is short.
    """

    def __init__(self, step: Step, device: Device, processes: int) -> None:
        """Spread the step over the processes. All call it, with the same weights, wherever these lie: a block at a time goes to the
        device, and only this process's share of it stays there."""
        self._step, self._mesh = step, init_device_mesh(device.torch.type, (processes,))
        # A tensor subclass of packed numbers cannot be cut by rows: each process keeps it whole.
        packed = {weight for weight in step.parameters() if type(weight.data) is not torch.Tensor}
        for weight in packed:
            weight.data = weight.data.to(device.torch)
        for part in (*step.denoiser.blocks, step):
            # Also the step's own weights go after each forward: without a backward pass, in validation, they would stay as they
            # were then, whatever an optimizer or an average does meanwhile.
            fully_shard(part, mesh=self._mesh, reshard_after_forward=True, ignored_params=packed)
        register_fsdp_forward_method(step, "predict")
        found: dict[str, Any] = {name: weight for name, weight in step.named_parameters() if weight.requires_grad}
        self.whole: dict[str, DTensor] = found
        self.named: list[tuple[str, Tensor]] = [
            (name, nn.Parameter(_share_of(weight))) for name, weight in self.whole.items()
        ]

    def take_gradients(self) -> None:
        """After a step's backward passes: of the whole weights, to the shares."""
        for (_, share), weight in zip(self.named, self.whole.values(), strict=True):
            share.grad = None if weight.grad is None else _share_of(weight.grad)
            weight.grad = None

    def alike(self, name: str, value: Tensor) -> bool:
        """Whether a tensor has the numbers of this process's share of a weight, one for one."""
        return value.ndim > 0 and value.shape == _share_of(self.whole[name]).shape

    def joined(self, name: str, value: Tensor) -> Tensor:
        """Something that has a number for each of this process's share of a weight, such as a moment, as a part of the whole:
        `on_cpu` puts it together."""
        weight = self.whole[name]
        return DTensor.from_local(
            value, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )

    def share(self, name: str, whole: Tensor) -> Tensor:
        """This process's share of something of a weight's shape, which every process has whole. Nothing is sent."""
        weight = self.whole[name]
        return _share_of(distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None))

    def norm(self, own: Tensor) -> Tensor:
        """2-norm of all shares together. own: of this process's. Nothing waits for the device."""
        squares = own.square()
        dist.all_reduce(squares, group=self._mesh.get_group())
        total: Tensor = squares.sqrt()
        return total

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser for predictions outside a training step, in which all processes run each block together."""
        return _Joined(self._step.denoiser, self._step)


class _Joined:
    """A denoiser whose predictions go through the step, which gathers the weights that lie in no block."""

    def __init__(self, denoiser: Denoiser, step: Step) -> None:
        self.module, self.blocks, self.predict = denoiser.module, denoiser.blocks, step.predict
        self.fold, self.gradient_checkpointing, self.save = (
            denoiser.fold,
            denoiser.gradient_checkpointing,
            denoiser.save,
        )


def _share_of(weight: Tensor) -> Tensor:
    assert isinstance(weight, DTensor)
    share: Tensor = weight.to_local().detach()
    return share
