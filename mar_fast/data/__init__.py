"""Videos and lists of videos: decoding, framing, views, annotations."""

from .annotations import read_annotations, read_labels
from .video import read_clip, read_views, sample_clip

__all__ = ["read_annotations", "read_clip", "read_labels", "read_views", "sample_clip"]
