"""Writes a model as one ONNX file, which runs without PyTorch and this project (docs/onnx.md says how).

    python tools/export.py --checkpoint model.pt --out model.onnx

`images`, float32 (B, 3, S, S), RGB with values 0 to 255, go in. `probabilities` (B, 6) come out, and of what
the model has learned `predicted_age`, `age_low` and `age_high` (B,) in years and `masks` (B, 1, S, S),
probabilities. The file's metadata say what a program must know to use it.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cli
import predict
from common import load_model, pixel_statistics
from faces import LANDMARK_NAMES, LANDMARKS
from utkface import AGE_GROUPS


class ExportedModel(nn.Module):
    """The model from raw pixels to probabilities, so that whoever runs it needs to know nothing else."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        for name, values in zip(("mean", "std"), pixel_statistics(torch.device("cpu"))):
            self.register_buffer(name, values)

    def forward(self, images):
        """RGB float32 (B, 3, S, S), values 0–255 → what `predict.outputs` says, in its order."""
        return list(predict.outputs(self.model, (images - self.mean) / self.std).values())


def metadata(model, image_size):
    """What a program must know to use the file: texts by name."""
    about = {
        "groups": ",".join(AGE_GROUPS),
        "group_years": json.dumps(AGE_GROUPS),
        "input": f"RGB, float32, 0 to 255 (not 0 to 1), an aligned face of {image_size} x {image_size}",
        "landmarks": json.dumps(dict(zip(LANDMARK_NAMES, LANDMARKS.tolist()))),
        "landmarks_unit": "shares of the side from the upper left corner; right and left are the person's",
        "licence": "if trained on UTKFace, as the released model is: non-commercial research only",
    }
    if model.by_year:
        about["age_unit"] = "years; the age lies from age_low to age_high with a probability of 80 %"
    if model.decoder is not None:
        about["mask_threshold"] = "0.5"
    return about


def get_parser():
    parser = cli.script_parser("export", __doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="written by finetune.py; else model.pt, else the released one")
    add("--out", metavar="FILE.onnx", default="model.onnx", help="file to write")
    return parser


def main(args):
    cli.check_output("--out", args.out)
    path = cli.shipped(predict.choose_checkpoint(args.checkpoint))
    if os.path.realpath(args.out) == os.path.realpath(path):
        raise cli.UserError(f"--out {args.out} would replace the checkpoint: name another file")
    model, checkpoint = load_model(path, torch.device("cpu"))
    try:
        import onnx
        import onnxscript  # which torch's exporter needs
    except ImportError as error:
        raise cli.UserError(f"this needs {error.name}: pip install onnx onnxscript") from None
    side = checkpoint["preprocessing"]["image_size"]
    images = torch.zeros(2, 3, side, side)
    with cli.atomic_path(args.out) as temporary:
        try:
            torch.onnx.export(
                ExportedModel(model).eval(), (images,), temporary, input_names=["images"],
                output_names=list(predict.outputs(model, images)), dynamo=True, external_data=False,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, verbose=False,
            )  # fmt: skip
        except OSError:
            raise
        except Exception as error:  # what the exporter raises depends on both versions
            reason = f"{type(error).__name__}, torch {torch.__version__}, onnxscript {onnxscript.__version__}"
            raise cli.UserError(f"export failed ({reason}): pip install -U torch onnxscript") from None
        graph = onnx.load(temporary)
        for part in (graph.graph, *graph.graph.node, *graph.graph.value_info, *graph.functions):
            del part.metadata_props[:]  # where in this machine's files each node was made
        onnx.helper.set_model_props(graph, metadata(model, side))
        onnx.save(graph, temporary)
    print(f"{args.out} written: {side} px, {', '.join(AGE_GROUPS)}")


if __name__ == "__main__":
    cli.run(main, get_parser())
