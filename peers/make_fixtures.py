"""Write tests/fixtures/modelopt.safetensors: ModelOpt's packed bytes and block scales on every corner and a random sample.

    .venv-peers/bin/python -m peers.make_fixtures

Each case `NAME/TYPE` has the tensors `NAME/TYPE: x`, `… tensor_scale`, `… packed` and `… block_scale`.
"""

from importlib.metadata import version
from pathlib import Path

from safetensors.torch import save_file

from peers.conformance import by_modelopt, named_cases
from peers.corners import DTYPES, MAGNITUDES, SCALES, random_cases

PATH = Path(__file__).parent.parent / "tests" / "fixtures" / "modelopt.safetensors"
SAMPLE_ROWS, SAMPLE_WIDTH = 1, 256


def main() -> None:
    kinds = 2 * len(DTYPES) * len(MAGNITUDES) * len(SCALES)
    inputs = [(f"{case.name}/{str(case.x.dtype)[6:]}", case) for case in named_cases()]
    sample = random_cases(kinds * SAMPLE_ROWS * SAMPLE_WIDTH, width=SAMPLE_WIDTH, seed=1)
    inputs += [(case.name, case) for case in sample]
    tensors = {}
    for name, case in inputs:
        encoding = by_modelopt(case.x, case.tensor_scale)
        found = {
            "x": case.x,
            "tensor_scale": case.tensor_scale.clone(),
            "packed": encoding.packed,
            "block_scale": encoding.block_scale,
        }
        tensors |= {f"{name}: {key}": value.contiguous() for key, value in found.items()}
    save_file(tensors, PATH, {"written by": f"nvidia-modelopt {version('nvidia-modelopt')}"})
    print(f"{PATH}: {len(inputs)} cases, {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
