#!/bin/sh
# Installs the wheel in dist/ into an empty environment and runs one operator there, forward and backward.
set -eu
python=${1:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip --disable-pip-version-check install --quiet -c "$root/constraints.txt" "$root"/dist/vidkern-*.whl
cd "$scratch" # away from the checkout, so that only the installed package can be imported
venv/bin/python - <<'PYTHON'
import pathlib
import torch
import vidkern

assert "site-packages" in vidkern.__file__, vidkern.__file__
for name in ("_C_cpu.so", "py.typed"):
    assert (pathlib.Path(vidkern.__file__).parent / name).exists(), f"the wheel lacks {name}"
x = torch.randn(2, 4, 6, 64, requires_grad=True)
shift, scale = torch.randn(2, 4, 128).chunk(2, -1)
with vidkern.backend("cpu"):
    y = vidkern.ops.layer_norm_modulate(x, shift, scale)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
plain = torch.nn.functional.layer_norm(x, (64,), eps=1e-6) * (1 + scale[:, :, None]) + shift[:, :, None]
(plain_dx,) = torch.autograd.grad(plain.square().sum(), x)
torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)
torch.testing.assert_close(dx, plain_dx, rtol=1e-4, atol=1e-4)
PYTHON
venv/bin/python -m vidkern doctor
echo "wheel: 1 passed, 0 failed"
