"""Run by the Python of a fresh environment with a wheel in it: does what is installed work?

    python smoke.py FOLDER VERSION VARIANT

FOLDER is the environment's, VERSION the wheel's, VARIANT cpu or cuda. Prints as JSON what it was tried with.
"""

import json
import sys
from pathlib import Path

import torch

import evit_ext
from evit_ext import _C, models, ops


def main() -> None:
    folder, version, variant = sys.argv[1:]
    where = Path(evit_ext.__file__).resolve()
    assert Path(folder).resolve() in where.parents, f"another evit_ext was imported: {where}"
    info = _C.build_info()
    assert evit_ext.__version__ == info["version"] == version, (
        evit_ext.__version__,
        info["version"],
        version,
    )
    assert info["cuda_operators"] is (variant == "cuda"), info
    torch.manual_seed(0)

    query, keys = torch.randn(3, 4, 32), torch.randn(3, 4, 197, 32)
    scores = ops.class_attention(query, keys)
    torch.testing.assert_close(scores, ops.reference.class_attention(query, keys))
    tokens = torch.randn(3, 197, 128, requires_grad=True)
    got, kept = ops.reorganize_tokens(tokens, scores, 99)
    wanted, wanted_kept = ops.reference.reorganize_tokens(tokens, scores, 99)
    assert torch.equal(kept, wanted_kept)
    torch.testing.assert_close(got, wanted)
    projection = torch.randn_like(got)
    (gradient,) = torch.autograd.grad((got * projection).sum(), tokens)
    (wanted_gradient,) = torch.autograd.grad((wanted * projection).sum(), tokens)
    torch.testing.assert_close(gradient, wanted_gradient)

    model = models.deit_tiny(keep_rate=0.7).eval()
    images = torch.randn(2, 3, 224, 224)
    with evit_ext.record_tokens(model) as record, torch.no_grad():
        logits = model(images)
    assert logits.shape == (2, 1000) and logits.isfinite().all()
    # ceil(0.7 n) of 196 patches; from the second stage on the fused token is one of the candidates.
    assert [kept.shape[1] for kept in record.kept] == [138, 98, 70], [kept.shape for kept in record.kept]
    # With gradients, the blocks run as they do in training, by other operators.
    torch.testing.assert_close(model(images).detach(), logits, rtol=1e-3, atol=1e-4)

    device = "tried on the CPU"
    if variant == "cuda" and torch.cuda.is_available():
        message = _C.cuda_self_test()
        assert message == "", message
        device = f"tried on the CPU, self-test on {torch.cuda.get_device_name()}"
    print(json.dumps({"torch": torch.__version__, "device": device}))


main()
