"""Picture files as they come, in RGB: turned upright, in sRGB, on white where transparent."""

from io import BufferedReader, BytesIO

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageCms, ImageOps

PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # told by content; no Ghostscript, ever
UNREAD = (".avif", ".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".tga", ".exr", ".dng")
DEEP = ("I", "I;16", "I;16B", "I;16L", "F")  # modes of more than 8 bits
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
Stream = BytesIO | BufferedReader
SRGB = ImageCms.createProfile("sRGB")


def read_rgb(stream: Stream) -> Image.Image:
    """The picture in a file, of an animation the first.

    Raises what Pillow raises for bytes that are no picture: OSError, ValueError, SyntaxError,
    Image.DecompressionBombError and others.
    """
    with Image.open(stream, formats=FORMATS) as opened:
        picture = eight_bits(ImageOps.exif_transpose(opened))
        alpha = None
        if picture.has_transparency_data:
            rgba = picture.convert("RGBA")
            picture, alpha = rgba.convert("RGB"), rgba.getchannel("A")
        rgb = in_srgb(picture, opened.info.get("icc_profile"))
    if alpha is None:
        return rgb
    return Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)


def eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or of floats up to 1 or up to 65535, in 8."""
    if picture.mode not in DEEP:
        return picture
    depth = np.asarray(picture, dtype=np.float32)
    full = 1.0 if picture.mode == "F" and depth.max() <= 1 else 65535.0
    return Image.fromarray((depth * (255 / full)).clip(0, 255).astype(np.uint8))


def in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB, by the picture's ICC profile where that can be read and is of its kind of colour."""
    if profile:
        plain = picture if picture.mode in ("L", "CMYK") else picture.convert("RGB")
        try:
            own = ImageCms.ImageCmsProfile(BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(own):  # 4 times what decoding takes
                moved = ImageCms.profileToProfile(plain, own, SRGB, outputMode="RGB")
                assert moved is not None  # it is where nothing is done in place
                return moved
        except (ImageCms.PyCMSError, OSError):
            pass
    return picture.convert("RGB")


def upright_size(stream: Stream, decode: bool) -> tuple[int, int]:
    """(width, height) of the picture as `read_rgb` gives it, from its header unless to `decode`.

    An orientation that a PNG holds behind its pixels is seen only when it is decoded.
    """
    if decode:
        return read_rgb(stream).size
    with Image.open(stream, formats=FORMATS) as opened:
        width, height = opened.size
        if opened.format == "TIFF" or (opened.format == "PNG" and "exif" not in opened.info):
            return width, height  # Pillow turns TIFFs; asking a PNG for its EXIF would decode it
        turned = opened.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    return (height, width) if turned else (width, height)


def cropped(picture: Image.Image, size: tuple[int, int]) -> UInt8[np.ndarray, "3 H W"]:
    """The middle of a picture, as large as has the shape of `size` (H, W), scaled to it."""
    height, width = size
    fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted).transpose(2, 0, 1)
