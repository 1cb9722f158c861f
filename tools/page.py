"""Serves a page in the browser: one gives a picture and sees its faces, their age groups and ages.

python tools/page.py                             # http://127.0.0.1:7860
python tools/page.py --host 0.0.0.0 --port 8000  # for others in the network as well
"""

import base64
import html
import io
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cli
import drawing
import predict
from utkface import AGE_GROUPS

EXAMPLES = [cli.ROOT / f"docs/drawn_{age}.jpg" for age in (10, 65)]  # by tools/synthesize.py
LONGEST = 1600  # pixels of the picture shown, which travels to a phone
PHONE = 24  # letters of a picture's width over this can be read where it is 390 pixels wide
ABOUT = """
Groups: {groups}. An age is an estimate of how old a face looks: the released model names the wrong group for
one face in four, and none must decide anything about a person. The range behind it holds the age with a
probability of 80 %. The picture stays on the machine that serves this page, and is deleted within minutes."""
STYLE = """
.faces img {width: 100%; max-height: 75vh; object-fit: contain}
.faces p {border-left: 8px solid; padding: 2px 12px; margin: 12px 0; font-size: 17px; line-height: 1.5}
"""
# Pasting works like choosing a file, and until its answer comes, or if it is refused, no old one is shown.
SCRIPT = """<script>
const show = how => document.querySelector("#answer").style.display = how;
document.addEventListener("change", event => event.target.type === "file" && show("none"), true);
document.addEventListener("drop", () => show("none"), true);
document.addEventListener("paste", event => {
    const field = document.querySelector("#picture input[type=file]");
    if (!field || !event.clipboardData.files.length) return;
    field.files = event.clipboardData.files;
    field.dispatchEvent(new Event("change", {bubbles: true}));
});
</script>"""


def answer(data, loaded):
    """HTML for an uploaded file's bytes: the picture itself, with a card a face, or why it cannot be used."""
    picture = predict.read_faces(loaded, predict.Picture(Path("upload"), data or b""))
    if picture.reason:
        return f"<p>This picture cannot be used: {html.escape(picture.reason)}.</p>"
    faces, image = predict.score(loaded, picture.crops), predict.read_picture(picture)
    numbers = [str(number) for number in range(1, len(faces) + 1)]
    drawn = drawing.draw_faces(image, faces, numbers, size=max(13, image.shape[1] // PHONE))
    drawn.thumbnail((LONGEST, LONGEST), Image.Resampling.BOX)
    buffer = io.BytesIO()
    drawn.save(buffer, "JPEG", quality=95)
    code = base64.b64encode(buffer.getvalue()).decode()
    page = f'<div class="faces"><img alt="faces" src="data:image/jpeg;base64,{code}">'
    for number, face in zip(numbers, faces):
        color = drawing.COLORS[face.group]
        page += f'<p style="border-color: rgb{color}"><b>{number}.</b> {drawing.label(face)}</p>'
    return page + "</div>"


def get_parser():
    parser = cli.script_parser("page", __doc__)
    add = parser.add_argument
    predict.add_model_flags(parser)
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", metavar="N", type=cli.number(int, 1, 65535), default=7860, help="port to listen on")
    return parser


def main(args):
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # else the browser keeps the pictures
    for name in ("no_proxy", "NO_PROXY"):  # Gradio asks its own server whether it runs
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "localhost,127.0.0.1", args.host)))
    with tempfile.TemporaryDirectory() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        serve(args, Path(uploads))


def serve(args, uploads):
    """Serves the page until it is stopped; what is uploaded lies in the folder `uploads` meanwhile."""
    try:
        import gradio
    except ImportError:
        raise cli.UserError("this needs gradio: pip install -U gradio") from None
    checkpoint = predict.choose_checkpoint(args.checkpoint)
    loaded = predict.load(checkpoint, args.detector, args.aligned, args.device, args.precision)
    wanted = "one face, cropped and upright" if args.aligned else "any photograph"
    groups = [f"{name} {first}–{last}" for name, (first, last) in AGE_GROUPS.items()]
    with gradio.Blocks(title="Age group of a face", delete_cache=(60, 60)) as page:
        gradio.Markdown(f"# Age group of a face\nGive {wanted}: choose, drop or paste it.")
        # Bytes, for `decode_image` alone to touch: Gradio's image widgets decode what they are given.
        file = gradio.File(
            label="Picture", type="binary", file_types=["image"], height=140, elem_id="picture"
        )
        with gradio.Row():
            buttons = [gradio.Button("Example", icon=path, size="sm") for path in EXAMPLES]
            for button in buttons:  # else their pictures are deleted like uploads
                button.keep_in_cache.add(button.icon["path"])
        shown = gradio.HTML(elem_id="answer")
        gradio.Markdown(ABOUT.format(groups=", ".join(groups).replace("–999", " and above")))

        def reply(data):
            cli.remove_leftovers(uploads, "tmp*", age=600)  # uploads that broke off, which Gradio forgets
            return answer(data, loaded), None  # the field is free for the next

        again = {"fn": None, "js": "() => show('')"}
        file.upload(reply, file, [shown, file], api_name="predict").then(**again)
        for button, path in zip(buttons, EXAMPLES):
            button.click(partial(reply, path.read_bytes()), None, [shown, file]).then(**again)
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no web fonts
    try:
        page.launch(
            server_name=args.host, server_port=args.port, max_file_size="20mb", theme=theme, footer_links=[],
            css=STYLE, head=SCRIPT, share=False,
        )  # fmt: skip
    except OSError as error:
        place = f"--host {args.host} or --port {args.port}"
        raise cli.UserError(f"{place} cannot be used ({error}): name another") from None
    finally:
        page.close()


if __name__ == "__main__":
    cli.run(main, get_parser())
