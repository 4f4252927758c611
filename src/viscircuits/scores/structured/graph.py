"""The part of the recorded autograd graph between two tensors, and how a cotangent is carried through it.

A rule for one kind of operation gets what arrives at the node and returns what goes to each of its
inputs. An operation without a rule, or in a case that its rule does not know (`Unknown`), is left to
autograd: the node itself is called, one row at a time, which costs and gives what the loop does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from viscircuits.scores.structured.forms import Cotangent, Dense, added, as_dense, n_bytes


class Unsupported(Exception):
    """A way between two layers on which no cotangent can be carried."""


class Unknown(Exception):
    """A case of an operation that its rule does not know; autograd does."""


T = TypeVar("T")
N_TEMPORARY = 3  # copies of a cotangent that an operation holds at a time

Passed = list[Cotangent | None]
Rule = Callable[["Graph", Any, Cotangent], Passed]


@dataclass(frozen=True)
class Merge:
    """A rule for an operation with several outputs and one input: output → cotangent of the same rows."""

    rule: Callable[["Graph", Any, dict[int, Cotangent]], Cotangent]


Place = tuple[Any, int]  # an operation and which of its outputs


class Graph:
    """What lies between a source and a target of one forward pass.

    Parameters
    ----------
    source, target
        Two recorded tensors.
    rules
        Name of an autograd node → its rule.
    dtype
        Of dense maps.
    """

    def __init__(self, source: Tensor, target: Tensor, rules: Mapping[str, Rule | Merge], dtype: torch.dtype) -> None:
        end, start = get_gradient_edge(source), get_gradient_edge(target)
        self.end: Place = (end.node, end.output_nr)
        self.start: Place = (start.node, start.output_nr)
        self.source, self.rules, self.dtype = source, rules, dtype
        self.order = self._between()
        self.kept: dict[tuple[Node, str], Any] = {}  # what a rule need not compute twice
        self.left: set[str] = set()
        self.waiting: dict[Place, list[Cotangent]] = {}  # what arrived, and where, while something is carried
        self.row_bytes = 0  # the most that one target takes up on the way
        if not self.order:
            raise Unsupported("a way that no gradient takes")

    def _between(self) -> list[Node]:
        """Nodes on a path from target to source, each before the nodes it passes cotangents to."""
        end = self.end[0]
        self.leads: dict[Node, bool] = {end: True}
        order: list[Node] = []
        stack: list[tuple[Node, bool]] = [(self.start[0], False)]
        while stack:
            node, seen = stack.pop()
            following = [n for n, _ in node.next_functions if n is not None]
            if seen:
                self.leads[node] = any(self.leads[n] for n in following)
                if self.leads[node]:
                    order.append(node)
            elif node not in self.leads:
                self.leads[node] = False
                stack.append((node, True))
                stack += [(n, False) for n in following if n not in self.leads]
        return order[::-1]

    def is_on(self, place: tuple[Node | None, int]) -> bool:
        """Whether a cotangent given to this place can reach the source."""
        node, output = place
        if node is None or not self.leads.get(node, False):
            return False
        return node is not self.end[0] or output == self.end[1]

    def pull(self, start: Cotangent) -> list[Cotangent]:
        """Carry a cotangent of the target back to the source: parts that have no row in common."""
        waiting = self.waiting = {self.start: [start]}
        for node in self.order:
            outputs = range(len(node._input_metadata))
            here = {output: waiting.pop((node, output)) for output in outputs if (node, output) in waiting}
            for passed in self._through(node, here):
                for place, cotangent in zip(node.next_functions, passed, strict=True):
                    if cotangent is not None and self.is_on(place):
                        self._measure(cotangent)
                        waiting[place] = self._joined(waiting.get(place, []), cotangent, place)
        return waiting.get(self.end, [])

    def shape_at(self, place: Place) -> tuple[int, ...]:
        """Shape of the value a cotangent at this place belongs to."""
        node: Any = place[0]
        if place == self.end:
            return tuple(self.source.shape)
        if node.name() == "torch::autograd::AccumulateGrad":
            return tuple(node.variable.shape)
        return tuple(node._input_metadata[place[1]].shape)

    def _through(self, node: Any, here: dict[int, list[Cotangent]]) -> Iterable[Passed]:
        """What a node makes of what arrived at it, part by part."""
        rule = self.rules.get(node.name())
        if isinstance(rule, Merge):
            first = next(iter(here.values()))[0]
            if all(len(parts) == 1 and torch.equal(parts[0].rows, first.rows) for parts in here.values()):
                yield [rule.rule(self, node, {output: parts[0] for output, parts in here.items()})]
                return
        elif list(here) == [0] and rule is not None:
            unknown = []
            for each in here[0]:
                passed = self._by_rule(rule, node, each)
                if passed is None:
                    unknown.append(each)
                else:
                    yield passed
            here = {0: unknown} if unknown else {}
        if here:
            self.left.add(node.name())
            yield self._by_autograd(node, here)

    def _by_rule(self, rule: Rule, node: Any, cotangent: Cotangent) -> Passed | None:
        """What a rule gives; None for a case that it does not know."""
        try:
            return rule(self, node, cotangent)
        except Unknown:
            return None

    def _by_autograd(self, node: Any, here: dict[int, list[Cotangent]]) -> Passed:
        """Call the node itself, row by row."""
        rows = torch.cat([each.rows for parts in here.values() for each in parts]).unique()
        given = {output: self._row_by_row((node, output), parts) for output, parts in here.items()}
        outputs = range(len(node._input_metadata))
        results = [self._called(node, [given.get(output, {}).get(row) for output in outputs]) for row in rows.tolist()]
        return [self._stacked(each, rows) for each in zip(*results, strict=True)]

    def _called(self, node: Any, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """What a node gives its inputs, added up over what was broadcast, as autograd itself would do it."""
        if callable(node):
            results = node(*gradients)
        else:  # written in Python: expects every gradient, answers for every argument
            given = zip(gradients, node._input_metadata, strict=True)
            results = node.apply(
                *(torch.zeros(m.shape, dtype=m.dtype, device=m.device) if g is None else g for g, m in given)
            )
        results = list(results) if isinstance(results, tuple) else [results]
        if len(results) > len(node.next_functions):  # the arguments that are not tensors got None
            results = [each for each in results if each is not None]
        places = zip(results, node.next_functions, strict=True)
        return [
            each.sum_to_size(self.shape_at(to)) if each is not None and self.is_on(to) else None for each, to in places
        ]

    def _row_by_row(self, place: Place, parts: list[Cotangent]) -> dict[int, Tensor]:
        """Row → its cotangent as autograd wants it."""
        meta = place[0]._input_metadata[place[1]]
        found: dict[int, Tensor] = {}
        for part in parts:
            maps = as_dense(part, 0 if isinstance(part, Dense) else meta.shape[part.axis]).maps.to(meta.dtype)
            found.update(zip(part.rows.tolist(), maps.contiguous().unbind(0), strict=True))
        return found

    def _stacked(self, maps: Sequence[Tensor | None], rows: Tensor) -> Dense | None:
        """The rows that something came out for; what arrived at another output may give an input nothing."""
        known = [each for each in maps if each is not None]
        mine = torch.tensor([each is not None for each in maps], device=rows.device)
        return Dense(torch.stack(known).to(self.dtype), rows[mine]) if known else None

    def _joined(self, parts: list[Cotangent], new: Cotangent, place: Place) -> list[Cotangent]:
        """Add a cotangent to those that wait at a place, keeping rows apart."""
        shape = self.shape_at(place)
        joined: list[Cotangent] = []
        left: Cotangent | None = new
        for part in parts:
            if left is None:
                joined.append(part)
                continue
            both, alone, left = added(part, left, shape)
            joined += [each for each in (both, alone) if each is not None]
        return joined if left is None else [*joined, left]

    def slope(self, node: Any) -> Tensor:
        """Derivative of an elementwise operation at every position: its cotangent of ones."""
        return self.keep(node, "slope", lambda: self._pull_ones(node))

    def _pull_ones(self, node: Any) -> Tensor:
        meta = node._input_metadata[0]
        result = node(torch.ones(tuple(meta.shape), dtype=meta.dtype, device=meta.device))
        if isinstance(result, Tensor):
            return result
        return next(each for each, place in zip(result, node.next_functions, strict=False) if self.is_on(place))

    def keep(self, node: Node, what: str, make: Callable[[], T]) -> T:
        """Compute something of a node once."""
        if (node, what) not in self.kept:
            self.kept[node, what] = make()
        return self.kept[node, what]

    def _measure(self, cotangent: Cotangent) -> None:
        self.row_bytes = max(self.row_bytes, N_TEMPORARY * n_bytes(cotangent) // len(cotangent.rows))
