"""A network without the circuit, in ordinary weights.

1. Trace the network once, and walk back from each layer of the circuit through operations that
   pass a unit on unchanged (activations, concatenations) to the weights that make it.
2. Where such weights exist and nothing else depends on them, set them so that the unit is the
   constant the ablation asks for: the edit is *folded* and the architecture stays as it was.
3. Elsewhere (a residual stream) insert a `UnitGate`.
4. Compare with the ablated network on real images; an edit that differs is not returned.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn

from viscircuits.ablation import ABLATIONS, Statistics, ablate, describe_layers
from viscircuits.circuit import Circuit
from viscircuits.errors import ModelError, ViscircuitsError
from viscircuits.files import write_atomically
from viscircuits.gates import insert_gates
from viscircuits.hooks import evaluating, forward
from viscircuits.layers import Layer
from viscircuits.models import ModelSpec, as_spec
from viscircuits.scores.formulas import choose
from viscircuits.tracing import Operation, Trace, trace

TOLERANCE = 1e-4  # of the largest output, for the rounding of a folded layer against a replaced one

Constants = dict[int, float]  # unit index → the constant it becomes
Plan = list[tuple[str, str | None, Constants]]  # weight and bias that make units, and what these become


@dataclass(frozen=True)
class Edited:
    """A network without a circuit.

    Parameters
    ----------
    model
        The new network, in evaluation mode; the one it was made from is untouched.
    folded
        Layers whose units were removed by changing existing weights.
    gates
        Address → shape of each gate that had to be inserted.
    difference
        Largest difference from the ablated network's outputs on the images it was checked on,
        relative to the largest output.
    provenance
        What was edited and how.
    """

    model: nn.Module
    folded: tuple[str, ...]
    gates: Mapping[str, Mapping[str, int]]
    difference: float
    provenance: Mapping[str, object] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write the weights as safetensors; `load_model(address, weights=path)` reads them back."""
        header = {"viscircuits": json.dumps({"gates": self.gates, **self.provenance}, sort_keys=True)}
        state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in self.model.state_dict().items()}
        return write_atomically(Path(path), save(state, metadata=header))

    def export_onnx(self, path: str | Path, images: Float[Tensor, "image *axes"]) -> float:
        """Write the network as ONNX and check it under onnxruntime on `images`.

        Returns
        -------
        float
            Largest difference from the network's own outputs, relative to the largest.

        Raises
        ------
        ViscircuitsError
            If the onnx extra is not installed, or the network cannot be exported or differs then;
            nothing is written.
        """
        try:
            import onnx  # noqa: F401
            import onnxruntime
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ViscircuitsError(f"ONNX export needs {error.name}: pip install 'viscircuits[onnx]'") from error
        images = images.to(next((p for p in self.model.parameters() if p.is_floating_point()), images))
        with evaluating(self.model), torch.no_grad():
            expected = forward(self.model, images)
            content = _as_onnx(self.model, images)
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        (given,) = session.run(None, {session.get_inputs()[0].name: images.cpu().numpy()})[:1]
        difference = _check(torch.from_numpy(given), expected.cpu(), "the ONNX export", "the network", 1e-3)
        write_atomically(Path(path), content)
        return difference


def edit(
    model: nn.Module | ModelSpec,
    circuit: Circuit,
    images: Float[Tensor, "image *axes"],
    *,
    ablation: str = "zero",
    reference: Statistics | None = None,
) -> Edited:
    """Return a new network from which the circuit's units are gone for good.

    Parameters
    ----------
    model
        The network; it is left untouched.
    circuit
        The units to remove.
    images
        Real images, already transformed, on which the new network is checked against `ablate`.
    ablation
        ``zero`` or ``mean``: what can be a constant in weights.
    reference
        What `measure` gave for the reference images; needed for ``mean``.

    Raises
    ------
    ViscircuitsError
        If the ablation is no constant, or the edited network differs from the ablated one.
    LayerError
        If a layer of the circuit is one call of several, where no weights can tell the calls apart.
    """
    choose(ABLATIONS, ablation, "ablation")
    if ablation not in ("zero", "mean"):
        raise ViscircuitsError(
            f"{ablation!r} ablation draws anew for each image, which no weights can; use zero or mean"
        )
    spec = as_spec(model)
    with evaluating(spec.model), torch.no_grad(), ablate(spec, circuit, ablation, reference=reference):
        expected = forward(spec.model, images)
    traced = trace(spec.model, images)
    layers = describe_layers(spec, images, [layer for layer, indices in circuit.units.items() if indices])
    constants = {
        layer.address: {
            index: 0.0 if ablation == "zero" else float(reference.mean[layer.address][index])  # type: ignore[union-attr]
            for index in circuit.units[layer.address]
        }
        for layer in layers
    }
    provenance = {"model": spec.address, "ablation": ablation, "units": {k: list(v) for k, v in circuit.units.items()}}
    for fold in (True, False):
        new, folded, gates = _remove(spec.model, traced, layers, constants, fold)
        with torch.no_grad():
            difference = _relative(forward(new, images), expected)
        if difference <= TOLERANCE:
            return Edited(new, folded, gates, difference, provenance)
    raise ModelError(
        f"the edited network differs from the ablated one by {difference:.1e} of its largest output; "
        "its computation cannot be said in weights at these layers. Use `ablate` instead, or other layers."
    )


def _remove(
    model: nn.Module, traced: Trace, layers: list[Layer], constants: Mapping[str, Constants], fold: bool
) -> tuple[nn.Module, tuple[str, ...], dict[str, dict[str, int]]]:
    new = copy.deepcopy(model).eval()
    weights = {
        **dict(new.named_parameters(remove_duplicate=False)),
        **dict(new.named_buffers(remove_duplicate=False)),
    }
    plans: dict[str, Plan] = {}
    for layer in layers:
        plan = _plan(traced, traced.value(layer.address), constants[layer.address], first=True) if fold else None
        if plan is not None:
            plans[layer.address] = plan
    with torch.no_grad():
        for plan in plans.values():
            for weight, bias, units in plan:
                _make_constant(weights[weight], None if bias is None else weights[bias], units)
    gates = {
        layer.address: {"n_units": layer.n_units, "unit_axis": layer.unit_axis}
        for layer in layers
        if layer.address not in plans
    }
    for address, gate in insert_gates(new, gates).items():
        with torch.no_grad():
            for index, value in constants[address].items():
                gate.scale[index], gate.shift[index] = 0.0, value
    return new, tuple(plans), gates


def _plan(traced: Trace, value: int, units: Constants, *, first: bool = False) -> Plan | None:
    """Which weights make these units, or None if no weights alone do."""
    operation = traced.producers.get(value)
    if operation is None or (not first and len(traced.consumers(value)) != 1):
        return None
    if operation.name in ("cat", "concat", "concatenate"):
        return _plan_pieces(traced, operation, units)
    if operation.name in _PASSES_ON:
        low, high = _passed_range(operation)
        if all(low <= constant <= high for constant in units.values()):
            return _plan(traced, operation.inputs[0], units)
        return None
    return _plan_weights(traced, operation, units)


def _plan_pieces(traced: Trace, operation: Operation, units: Constants) -> Plan | None:
    axis = traced.axes[operation.output]
    plan: Plan = []
    start = 0
    for piece in operation.inputs:
        stop = start + traced.shapes[piece][axis]
        mine = {index - start: constant for index, constant in units.items() if start <= index < stop}
        part = _plan(traced, piece, mine) if mine else []
        if part is None:
            return None
        plan += part
        start = stop
    joins_units = start == traced.shapes[operation.output][axis]  # and not, say, tokens
    return plan if joins_units else None


def _plan_weights(traced: Trace, operation: Operation, units: Constants) -> Plan | None:
    if operation.name not in ("batch_norm", "linear", "conv1d", "conv2d", "conv3d"):
        return None
    names = {name.rpartition(".")[2]: name for name in operation.weights}
    uses = sum(bool(set(operation.weights) & set(other.weights)) for other in traced.producers.values())
    if "weight" not in names or uses != 1:
        return None
    if "bias" not in names and any(constant != 0 for constant in units.values()):
        return None
    return [(names["weight"], names.get("bias"), units)]


def _make_constant(weight: Tensor, bias: Tensor | None, units: Constants) -> None:
    for index, constant in units.items():
        weight[index] = 0
        if bias is not None:
            bias[index] = constant


def _passed_range(operation: Operation) -> tuple[float, float]:
    """Between which bounds the operation hands a constant on as itself."""
    if operation.name.startswith("hardtanh"):
        bounds = [a for a in operation.arguments if isinstance(a, int | float) and not isinstance(a, bool)]
        return (float(bounds[0]), float(bounds[1])) if len(bounds) == 2 else (-1.0, 1.0)
    return _PASSES_ON[operation.name]


_INFINITY = float("inf")
# operations that pass a constant on as itself, with the range in which they do
_PASSES_ON = {
    "relu": (0.0, _INFINITY),
    "relu_": (0.0, _INFINITY),
    "relu6": (0.0, 6.0),
    **dict.fromkeys(("hardtanh", "hardtanh_"), (-1.0, 1.0)),  # unless its arguments say otherwise
    **dict.fromkeys(("dropout", "clone", "contiguous"), (-_INFINITY, _INFINITY)),
    **dict.fromkeys(("gelu", "silu", "silu_", "hardswish", "hardswish_", "leaky_relu", "leaky_relu_"), (0.0, 0.0)),
    **dict.fromkeys(("elu", "elu_", "selu", "mish", "tanh"), (0.0, 0.0)),
}


def _as_onnx(model: nn.Module, images: Tensor) -> bytes:
    """The network as an ONNX file's content, for any number of images."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        try:
            torch.onnx.export(
                model, (images,), str(path), dynamo=True, external_data=False, verbose=False,
                input_names=["images"], output_names=["outputs"],
                dynamic_shapes=({0: torch.export.Dim("image", min=1)},),
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            raise ModelError(f"torch cannot export {type(model).__name__} as ONNX: {error}") from error
        return path.read_bytes()


def _relative(given: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((given - expected).abs().max() / scale)


def _check(given: Tensor, expected: Tensor, what: str, of: str, tolerance: float) -> float:
    difference = _relative(given, expected)
    if not difference <= tolerance:
        raise ModelError(f"{what} differs from {of} by {difference:.1e} of its largest output")
    return difference
