"""What people bring: prompts in a file; pictures with captions in folders, tars and data sets."""

from flashdmd.data.catalogue import Catalogue
from flashdmd.data.opening import open_data, open_folder, open_pictures
from flashdmd.data.prompts import read_prompts
from flashdmd.data.source import Drawn, PictureSource
from flashdmd.data.teacher import TeacherSamples

__all__ = [
    "Catalogue",
    "Drawn",
    "PictureSource",
    "TeacherSamples",
    "open_data",
    "open_folder",
    "open_pictures",
    "read_prompts",
]
