"""List the lines for GPUs that no test on the fake runtime executes.

The program is `python -m tests.gpuless.gpu_lines FOLDER`. FOLDER contains the coverage data of the
tests, which they write with

    RSA_FAST_GPU_COVERAGE=FOLDER python -m pytest -m "" tests -k "gpu or sync or step"

A line counts as the GPU's if it is in a branch whose condition asks for one, after an early return
for the CPU, or in a function that takes or makes CUDA streams and events. The program prints the
lines that were not executed, and the number of all such lines. tests/gpuless/README.md says why
each is left.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from coverage import CoverageData

from tests.helpers import ROOT

ASKS = re.compile(r"""["']cuda|on_gpu|is_cuda|["']nccl|torch\.cuda\.|self\.stream is""")
ASKS_FOR_CPU = re.compile(r"""stream is None|["']cpu["'] or|not torch\.cuda""")
CUDA_CALL = re.compile(r"torch\.cuda\.|record_stream|wait_stream|pin_memory|batch_on_gpu")


def leaves(body: list[ast.stmt]) -> bool:
    return isinstance(body[-1], (ast.Return, ast.Raise, ast.Continue))


def gpu_lines(tree: ast.Module) -> Iterator[int]:
    """Yield the first lines of the statements that only a GPU needs."""

    def visit(body: list[ast.stmt], on_gpu: bool) -> Iterator[int]:
        for node in body:
            inside = on_gpu
            text = ast.unparse(node)
            compound = isinstance(node, (ast.If, ast.With, ast.For, ast.While, ast.Try))
            function = isinstance(node, (ast.FunctionDef, ast.ClassDef))
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            calls_cuda = not compound and not function and CUDA_CALL.search(text)
            if (on_gpu or calls_cuda) and not docstring:
                yield node.lineno
            if isinstance(node, ast.If):
                test = ast.unparse(node.test)
                asks, for_cpu = bool(ASKS.search(test)), bool(ASKS_FOR_CPU.search(test))
                yield from visit(node.body, (on_gpu or asks) and not (asks and for_cpu))
                yield from visit(node.orelse, on_gpu or (asks and for_cpu))
                if asks and for_cpu and leaves(node.body):
                    on_gpu = True
                continue
            if isinstance(node, ast.FunctionDef):
                inside = on_gpu or "torch.cuda.Stream" in ast.unparse(node.args)
            if compound or function:
                for part in ("body", "orelse", "finalbody"):
                    yield from visit(getattr(node, part, []), inside)
                for handler in getattr(node, "handlers", []):
                    yield from visit(handler.body, inside)

    yield from visit(tree.body, False)


def main(folder: Path) -> None:
    executed: dict[str, set[int]] = {}
    for file in folder.iterdir():
        data = CoverageData(str(file))
        data.read()
        for name in data.measured_files():
            executed.setdefault(name, set()).update(data.lines(name) or [])
    count = 0
    for path in sorted([*ROOT.glob("pipelines/*.py"), *ROOT.glob("rsa_fast/**/*.py")]):
        lines = path.read_text().splitlines()
        for number in sorted(set(gpu_lines(ast.parse(path.read_text())))):
            count += 1
            if number not in executed.get(str(path), set()):
                print(f"{path.relative_to(ROOT)}:{number}: {lines[number - 1].strip()}")
    print(f"of {count} lines")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
