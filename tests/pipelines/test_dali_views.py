"""DALI's graph for the GPU, checked without a GPU, and its CPU twin.

test_loaders.py checks the pixels of the CPU twin.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rsa_fast.pipelines import VIEWS, Loading, Order, open_source
from rsa_fast.pipelines.loading import Job
from rsa_fast.pipelines.views import ViewSpec
from tests.helpers import DALI

pytestmark = DALI


def job(folder, reads=VIEWS, decode_on="gpu"):
    source = open_source(folder, "pretrain")
    spec = ViewSpec(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    order = Order(len(source.manifest), 8, 0)
    loading = Loading("dali", aggressive_on="device", decode_on=decode_on)
    return Job(source, spec, frozenset(reads), order, torch.device("cpu"), torch.float32, loading)


def operators(pipe) -> list[tuple[str, str, dict[str, str]]]:
    """Return (name, device, other arguments) of each operator of the serialised graph.

    Serialising checks every argument.
    """
    pipe.serialize()
    found = []
    for operator in pipe._ops:
        lines = [line.strip() for line in str(operator.spec).splitlines()]
        arguments = dict(
            line.split(": ", 1) for line in lines if ": " in line and not line.startswith("OpSpec")
        )
        name = lines[0].split("OpSpec for ")[1].rstrip(":")
        found.append((name, arguments.pop("device"), arguments))
    return found


@pytest.mark.parametrize("decode_on", ["gpu", "cpu"])
def test_every_operator_of_the_gpu_graph_has_its_kernel(folder, decode_on):
    from nvidia.dali import backend

    from rsa_fast.pipelines.dali_views import build_graph

    found = operators(build_graph(job(folder, decode_on=decode_on), "gpu", None))
    for name, device, _ in found:
        assert device in backend.GetSchema(name).GetSupportedBackends(), name
    places = [device for name, device, _ in found if "Image" in name]
    assert places == ["mixed" if decode_on == "gpu" else "cpu"]
    assert [device for name, device, _ in found if name == "Resize"] == ["gpu", "gpu"]


def test_the_cpu_graph_is_the_gpu_s_twin(folder):
    from rsa_fast.pipelines.dali_views import build_graph

    gpu, cpu = (operators(build_graph(job(folder), device, None)) for device in ("gpu", "cpu"))
    assert [name for name, *_ in gpu] == [name for name, *_ in cpu]
    only_gpu = {"preallocate_width_hint", "preallocate_height_hint", "jpeg_fancy_upsampling"}
    for (name, _, on_gpu), (_, _, on_cpu) in zip(gpu, cpu, strict=True):
        differ = {
            key
            for key in on_gpu.keys() | on_cpu.keys()
            if on_gpu.get(key) != on_cpu.get(key) and key[0] != "_"
        }
        assert differ <= only_gpu, (name, differ)


def test_one_decode_and_only_the_crops_that_are_read(folder):
    from rsa_fast.pipelines.dali_views import build_graph

    for reads, crops in ((VIEWS, 2), (("aggressive_1", "weak_2"), 2), (("weak_2",), 1)):
        names = [name for name, *_ in operators(build_graph(job(folder, reads), "cpu", None))]
        assert sum("Image" in name for name in names) == 1 and names.count("Resize") == crops
    arguments = str(operators(build_graph(job(folder), "gpu", None)))
    assert "adjust_orientation': 'False" in arguments or "adjust_orientation': '0" in arguments


def test_views_made_on_the_host_are_refused_on_a_gpu_before_dali_starts(folder):
    from rsa_fast.pipelines.dali_views import DaliViews

    made_on_host = Loading("dali", aggressive_on="host")
    on_gpu = replace(job(folder), device=torch.device("cuda"), loading=made_on_host)
    with pytest.raises(
        ValueError, match="aggressive_on = host would copy the crops back from the GPU: use device"
    ):
        DaliViews(on_gpu)
