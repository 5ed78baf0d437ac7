"""Models that were trained with quantizers run as integers in the runtimes and equal what was trained."""

import pytest
import torch

import dwindle as dw
from dwindle.export.qdq import export_qdq
from dwindle.quantization import TrainingQuantizer, parity
from quantization.models import Encoder, residual
from quantization.test_runtimes import in_onnxruntime, in_openvino


def trained(model, batches, **options):
    """Train a few steps with quantizers; return the model under training and the integer one."""
    quantizer = TrainingQuantizer(model, calibration_data=batches, **options)
    model.train()
    with dw.compress(model, [quantizer]) as run:
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        run.add_parameters_to(optimizer)
        for batch in batches:
            output = model(batch)
            output = output["logits"] if isinstance(output, dict) else output
            optimizer.zero_grad()
            (output.square().mean() + run.loss()).backward()
            optimizer.step()
            run.step()
    return model.eval(), quantizer.finish()


@pytest.mark.parametrize(
    ("method", "bits", "backend"),
    [("qat", 8, None), ("lsq", 8, "openvino"), ("lsq", 4, None), ("dorefa", 3, None), ("tqt", 2, None)],
)
def test_a_convnet(tmp_path, method, bits, backend):
    model, x = residual()
    under_training, finished = trained(model, [x, x.flip(0)], method=method, bits=bits, backend=backend)
    path = export_qdq(finished, tmp_path / "model.onnx", x)
    for run in (in_onnxruntime(path), in_openvino(path)):
        for own in (under_training, finished):
            result = parity(own, run, [x, x[:3]])
            assert result.equal_predictions > 0.9
            assert result.sqnr_db > 30


def test_few_bits_between_layers_are_exact_in_the_runtime_they_are_placed_for(tmp_path):
    model, x = residual()
    under_training, finished = trained(model, [x, x.flip(0)], method="tqt", bits=2, backend="onnxruntime")
    run = in_onnxruntime(export_qdq(finished, tmp_path / "model.onnx", x))
    for own in (under_training, finished):
        assert parity(own, run, [x, x[:3]]).sqnr_db > 60


def test_a_transformer(tmp_path):
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (16, 12))
    under_training, finished = trained(Encoder(), [tokens, tokens.flip(1)], method="lsq_plus", bits=8)
    path = export_qdq(finished, tmp_path / "model.onnx", tokens)
    for run in (in_onnxruntime(path), in_openvino(path)):
        for own in (under_training, finished):
            assert parity(own, run, [tokens]).sqnr_db > 30
