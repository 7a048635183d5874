"""Pictures are read as they are, by one rule for every kind of file, or refused with the reason."""

from __future__ import annotations

import os
import re
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_inspector import packings, pictures
from edge_inspector.cameras.folder import FolderSource
from edge_inspector.config import CameraConfig
from edge_inspector.door import typed
from edge_inspector.errors import PictureError
from edge_inspector.frames import Pixels
from tests import files

CASES = Path(__file__).parent / "cases"
GREY = (np.arange(48 * 64) % 251).astype(np.uint8).reshape(48, 64)
COLOUR = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65535, (48, 64), np.uint16)
DEEP_COLOUR = np.random.default_rng(2).integers(0, 65535, (48, 64, 3), np.uint16)
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1], 5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1), 7: lambda p: np.rot90(p, 2).swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip
"""What a viewer shows of a picture with this orientation."""


def read(data: bytes) -> Pixels:
    return pictures.decode(data, "x")


def refusal(data: bytes) -> str:
    with pytest.raises(PictureError) as caught:
        read(data)
    assert caught.value.message.startswith("x: ")
    assert caught.value.hint
    return caught.value.message.removeprefix("x: ")


def by_hand(kind: str, orientation: int) -> bytes:
    """The colour picture as a file of some kind that says how it is to be turned."""
    exif = files.exif(orientation)
    made = {
        "png": lambda: files.png(COLOUR, [(b"eXIf", exif)]), "tiff": lambda: files.tiff(COLOUR, {274: orientation}),
        "deep tiff": lambda: files.tiff(COLOUR.astype(np.uint16), {274: orientation}),
        "jpeg": lambda: files.jpeg(COLOUR, exif), "webp": lambda: files.webp(COLOUR, exif),
    }  # fmt: skip
    return made[kind]()


@pytest.mark.parametrize("kind", ["png", "tiff", "deep tiff", "jpeg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_every_viewer_shows_it(kind: str, orientation: int) -> None:
    as_stored, turned = read(by_hand(kind, 1)), read(by_hand(kind, orientation))
    assert np.array_equal(turned, UPRIGHT[orientation](as_stored))
    assert turned.flags.c_contiguous


def test_the_pictures_of_a_phone_are_turned_alike() -> None:
    folder = CASES / "01-exif-orientation"
    upright, turned = pictures.read(folder / "exif1.jpg"), pictures.read(folder / "exif6.jpg")
    assert upright.shape == (48, 64, 3)
    assert np.array_equal(turned, np.rot90(upright, -1))
    assert pictures.read(folder / "orient6.tif").shape == (64, 48, 3)
    assert np.array_equal(read(files.jpeg(COLOUR, files.exif(9))), read(files.jpeg(COLOUR)))  # no such orientation


def test_a_whole_picture_may_have_bytes_behind_it() -> None:
    assert pictures.read(CASES / "02-jpeg-with-trailer" / "jtrail.jpg").shape == (128, 128, 3)
    for suffix in (".jpg", ".png", ".bmp", ".tif", ".webp", ".ppm", ".jp2"):
        data = pictures.encoded(COLOUR, suffix)
        assert np.array_equal(read(data + b"\0motion photo" * 50), read(data)), suffix
    preview = files.jpeg(GREY[:24, :32])
    assert np.array_equal(read(files.jpeg(COLOUR, several=True) + preview), read(files.jpeg(COLOUR)))


@pytest.mark.parametrize("name", ["jtrunc_eoi", "jhole", "jzero"])
def test_a_jpeg_with_damaged_data_is_refused_whatever_its_end(name: str) -> None:
    assert "damaged" in refusal((CASES / "03-damaged-jpeg-judged" / f"{name}.jpg").read_bytes())


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".webp", ".ppm", ".jp2"])
def test_a_picture_that_is_cut_off_is_refused(suffix: str) -> None:
    data = pictures.encoded(cv2.resize(COLOUR, (160, 120)), suffix)
    for length in (len(data) // 10, len(data) // 2, len(data) - 5):
        refusal(data[:length])


def test_damaged_data_is_refused_where_a_check_sum_tells() -> None:
    data = bytearray(pictures.encoded(COLOUR, ".png"))
    data[len(data) // 2] ^= 1
    assert "check sum" in refusal(bytes(data))
    packed = bytearray(files.tiff(COLOUR, deflate=True))
    packed[20] ^= 0xFF
    assert "damaged" in refusal(bytes(packed))
    missing = files.png_of(16, 12, 2, 8, zlib.compress(bytes(49) * 5))
    assert "damaged" in refusal(missing)


def test_a_jpeg_without_its_last_scans_is_refused() -> None:
    whole = cv2.imencode(".jpg", COLOUR, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    assert read(whole).shape == COLOUR.shape
    scans = [found.start() for found in re.finditer(rb"\xff\xda", whole)]
    for start in scans[1:]:
        tables = whole.rfind(b"\xff\xc4", 0, start)
        assert "scans are missing" in refusal(whole[:tables] + b"\xff\xd9")


def test_a_small_file_cannot_unpack_into_all_of_the_memory() -> None:
    packed = zlib.compress(bytes(64 << 20))
    assert len(packed) < 1 << 17
    tracemalloc.start()
    try:
        length = packings.deflated(packed)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert length == 64 << 20
    assert peak < 8 << 20
    for cut in (0, 1, len(packed) // 2, len(packed) - 1):
        with pytest.raises(ValueError, match="Deflate"):
            packings.deflated(packed[:cut])
    assert packings.deflated(zlib.compress(b"")) == 0


@pytest.mark.parametrize("packing", [cv2.IMWRITE_TIFF_COMPRESSION_LZW, cv2.IMWRITE_TIFF_COMPRESSION_PACKBITS])
def test_a_hole_in_a_packed_tiff_is_refused(packing: int) -> None:
    flat = np.zeros_like(GREY)
    for image in (GREY, COLOUR, DEEP, DEEP_COLOUR, flat, files.with_alpha(COLOUR), np.tile(COLOUR, (20, 3, 1))):
        data = cv2.imencode(".tif", image, [cv2.IMWRITE_TIFF_COMPRESSION, packing])[1].tobytes()
        seen = image[:, :, :3] if image.ndim == 3 else image
        assert np.array_equal(read(data), seen)
    scene = cv2.resize(COLOUR, (320, 240), interpolation=cv2.INTER_CUBIC)
    whole = cv2.imencode(".tif", scene, [cv2.IMWRITE_TIFF_COMPRESSION, packing])[1].tobytes()
    damaged = bytearray(whole)
    half = len(whole) // 2
    damaged[half : half + 300] = bytes(300)
    assert "damaged" in refusal(bytes(damaged))


def test_a_file_of_several_pictures_is_refused_with_their_number() -> None:
    assert refusal((CASES / "04-only-first-of-several" / "multi.tif").read_bytes()) == "holds 2 pictures, expected 1"
    assert "holds 3 pictures" in refusal(files.tiff(GREY, pages=3))
    assert "holds 3 pictures" in refusal(files.png(COLOUR, [(b"acTL", struct.pack(">II", 3, 0))]))
    assert "holds 2 pictures" in refusal(files.jpeg(COLOUR) * 2)
    assert "holds 2 pictures" in refusal(files.jpeg(COLOUR, several=True) + files.jpeg(COLOUR))  # two views
    assert "holds 2 pictures" in refusal(pictures.encoded(GREY, ".pgm") * 2)
    assert "holds 2 pictures" in refusal(files.animated_webp(COLOUR, 2))
    thumbnail = files.tiff(GREY, pages=2, later={254: 1})
    assert np.array_equal(read(thumbnail), GREY)


def test_min_is_white_is_inverted_in_both_depths() -> None:
    folder = CASES / "05-tiff-min-is-white-16"
    for bits, white in ((8, 255), (16, 65535)):
        black, inverted = (pictures.read(folder / f"{name}{bits}.tif") for name in ("mib", "miw"))
        assert np.array_equal(inverted, white - black)


@pytest.mark.parametrize("image", [GREY, COLOUR, DEEP, DEEP_COLOUR], ids=["grey", "colour", "deep", "deep colour"])
def test_the_same_numbers_come_out_of_every_kind_of_file_and_of_every_source(image: Pixels, tmp_path: Path) -> None:
    made = {
        "a.png": pictures.encoded(image), "b.tif": pictures.encoded(image, ".tif"), "c.tiff": files.tiff(image),
        "d.tif": files.tiff(image, order=">"), "e.png": files.png(image, [(b"gAMA", struct.pack(">I", 100000))]),
        "f.ppm": pictures.encoded(image, ".ppm" if image.ndim == 3 else ".pgm"), "g.dat": files.tiff(image, deflate=True),
        "h": files.png(image, [(b"tRNS", struct.pack(">H", 7) * (3 if image.ndim == 3 else 1))]),
        "i.png": files.png(files.with_alpha(image)), "j.jp2": files.jp2(image),
    }  # fmt: skip
    if image.dtype == np.uint8:
        made |= {"k.bmp": pictures.encoded(image, ".bmp"), "l.bmp": files.bmp(image, top_down=True)}
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    source = FolderSource(CameraConfig(uri=f"dir://{tmp_path}"), typed(tmp_path))
    source.open()
    for name in sorted(made):
        frame = source.read(1.0)
        assert frame is not None
        assert frame.source_id == name.partition(".")[0]
        for pixels in (pictures.read(tmp_path / name), frame.image):
            assert pixels.dtype == image.dtype, name
            assert np.array_equal(pixels, image), name


def test_what_programs_read_differently_is_refused() -> None:
    palette = struct.pack("<768H", *range(768))
    for data, words in (
        (files.tiff(GREY, {339: 2}), "signed or floating"), (files.tiff(GREY, {262: 3, 320: palette}), "colour kind 3"),
        (files.tiff(COLOUR, {284: 2}), "planes"), (files.tiff(GREY, {258: 12}), "12 bit"), (files.tiff(GREY, {259: 7}), "method 7"),
        (files.tiff(GREY, {254: 1}), "preview"), (files.cmyk_jpeg(), "CMYK"), (b"GIF89a" + bytes(20), "GIF files are not read"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "HEIF"), (b"P5 4 4 100\n" + bytes(16), "white is 100"), (b"", "empty file"),
        (b"text", "not a picture"), (files.bmp(COLOUR, bits=16), "16 bits a pixel"), (b"\xff\xd8\xff", "truncated"),
    ):  # fmt: skip
        assert words in refusal(data)


@pytest.mark.parametrize(
    ("width", "height", "words"), [(16384, 70000, "1147 megapixels"), ((1 << 20) + 1, 1, "1048577x1 px, at most")]
)
def test_a_picture_that_is_too_large_is_refused_with_both_figures(width: int, height: int, words: str) -> None:
    found = refusal(files.png_of(width, height, 0, 8, b"its header is enough"))
    assert words in found
    assert "can be read" in found
    assert "1074" in found or "1048576" in found


def test_random_bytes_behind_any_signature_end_in_a_refusal_or_in_pixels() -> None:
    rng = np.random.default_rng(3)
    kinds = [pictures.encoded(COLOUR, suffix) for suffix in (".png", ".jpg", ".tif", ".bmp", ".webp", ".ppm", ".jp2")]
    for _ in range(700):
        data = bytearray(kinds[rng.integers(len(kinds))])
        for _ in range(int(rng.integers(1, 6))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        try:
            assert read(bytes(data)).ndim in (2, 3)
        except PictureError as error:
            assert error.hint


# --- folders


def folder_of(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures.encoded(GREY))
    return folder


def test_every_picture_of_a_folder_is_taken_whatever_its_name_and_the_rest_is_told(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "left", "a.png", "b.jfif", "c.PPM", "d.jpe", "e", "f.bak", "sub/g.jp2", ".Trash-1000/files/h.png",
                       "@eaDir/i.png", ".j.png", "k.png~")  # fmt: skip
    folder_of(tmp_path / "elsewhere", "x.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(tmp_path / "elsewhere")
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)
    (folder / "gone.png").symlink_to("/mnt/not-mounted/003.png")
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    (folder / "notes.csv").write_text("part,kind\n")
    (folder / "blob").write_bytes(bytes(100))
    os.mkfifo(folder / "pipe.png")
    found = pictures.listed(folder)
    names = [str(path.relative_to(folder)) for path in found.taken]
    assert names == ["a.png", "again/x.png", "b.jfif", "c.PPM", "d.jpe", "e", "f.bak", "photo.heic", "sub/g.jp2"]
    harmless = {str(one.path.relative_to(folder)) for one in found.left_out if one.harmless}
    assert harmless == {".Trash-1000", "@eaDir", ".j.png", "k.png~", "linked", "sub/loop", "up", "notes.csv"}
    assert {(one.path.name, one.reason) for one in found.doubtful} == {
        ("gone.png", "a link to nothing"), ("blob", "of a kind that is not known"), ("pipe.png", "not a plain file"),
    }  # fmt: skip
    assert any("loop" in line and "up" in line for line in found.told)


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_folder_that_cannot_be_read_is_told_by_name(tmp_path: Path, mode: int) -> None:
    folder = folder_of(tmp_path / "noperm", "a.png", "sub/b.png")
    (folder / "sub").chmod(mode)
    imports, code = (
        "from pathlib import Path; from edge_inspector import pictures",
        f"print(pictures.listed(Path({str(folder)!r})).told)",
    )
    told = files.as_nobody(tmp_path, imports, code)
    assert "sub" in told
    assert "Permission denied" in told


def test_parts_are_called_by_their_paths_and_each_name_is_one_parts(tmp_path: Path) -> None:
    long = "x" * 200 + ".png"
    folder = folder_of(tmp_path, "dent/000.png", "scratch/000.png", "1.png", "1.jpg", "paper-003.png", long)
    (folder / os.fsdecode(b"Gr\xfcn\n.png")).write_bytes(pictures.encoded(GREY))
    names = pictures.part_names(pictures.listed(folder).taken, folder)
    assert set(names) >= {"dent/000", "scratch/000", "1.png", "1.jpg", "paper-003", r"Gr\xfcn\n"}
    assert len(set(names)) == len(names) == 7
    assert max(map(len, names)) <= 160
    for name in names:
        name.encode()
