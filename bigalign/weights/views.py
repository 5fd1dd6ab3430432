"""How a checkpoint's image tower was given its images: size, resize, crop and filter."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from bigalign import tree
from bigalign.weights.files import read_json

_FILTERS = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}
_OPEN_CLIP = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")
_HUGGING_FACE = (
  *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale"),
  *("rescale_factor", "do_normalize", "image_mean", "image_std"),
)
# Keys that do not change the pixels, or only with others that are refused.
_HARMLESS = (
  *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map"),
  *("_valid_processor_keys", "do_convert_rgb", "data_format", "input_data_format"),
  *("default_to_square", "return_tensors", "device", "disable_grouping", "pad_size"),
  *("max_num_patches", "patch_size", "tokenizer_class", "transformers_version"),
)
_OFF = ("do_pad", "do_flip_channel_order", "do_reduce_labels", "do_thumbnail", "use_square_size")
# {image processor of transformers 5.23: what a key means that its file leaves out}
_SQUARE = {"height": 224, "width": 224}
_EDGE = {"shortest_edge": 224}
_PROCESSORS: dict[str, dict[str, Any]] = {
  "CLIP": dict(resample=3, size=_EDGE, do_center_crop=True),
  "Siglip": dict(resample=3, size=_SQUARE, do_center_crop=False),
  "ViT": dict(resample=2, size=_SQUARE, do_center_crop=False),
  "Bit": dict(resample=3, size=_EDGE, do_center_crop=True, crop_size=224),
  "DINOv3ViT": dict(resample=2, size=_SQUARE, do_center_crop=False),
}
# Their towers take images of any size; those of the others take their own size only, which comes
# before the 224 pixels of a class.
_ANY_SIZE = ("Bit", "DINOv3ViT")
# {kind of a checkpoint: its processor, unless the file names one}
_PROCESSOR = {
  **dict.fromkeys(("clip", "clip_vision_model"), "CLIP"),
  **dict.fromkeys(("siglip", "siglip_vision_model"), "Siglip"),
  **dict.fromkeys(("dinov2", "dinov2_with_registers"), "Bit"),
  "vit": "ViT",
  "dinov3_vit": "DINOv3ViT",
}
_NPZ = ("big_vision", "resnet_cifar", "mobilenet_v2")  # files without a config


class View(NamedTuple):
  """What the files of a checkpoint state about the view of an image.

  Args:
    where: the file and the place in it of the options.
    options: some of resize, resize_edge and interpolation, as in config.data.
    size: pixels per side; None if it is unknown.
    size_where: the file and the place in it of the size; "" if no file states it.
    left_out: keys of `options` that the file leaves out, so that its library's default holds.
    missing: whether the file does not exist; `options` are then the defaults of the library.
  """

  where: str
  options: dict[str, Any]
  size: int | None
  size_where: str
  left_out: tuple[str, ...] = ()
  missing: bool = False


class Preprocessing(NamedTuple):
  """The section about images in the files next to weights.

  Args:
    where: the file and the place in it.
    kind: the checkpoint's name in LAYOUTS.
    config: the section; empty if the file has none.
    missing: whether the file does not exist.
  """

  where: str
  kind: str
  config: Mapping[str, Any]
  missing: bool = False


def preprocessing(folder: pathlib.Path, kind: str) -> Preprocessing | None:
  """Returns the section about images in the files next to the weights.

  Args:
    folder: of the weights.
    kind: the checkpoint's name in LAYOUTS.

  Returns:
    The section; None for a .npz file without one, whose library has no defaults.

  Raises:
    ValueError: if the section is not an object.
  """
  if kind == "open_clip":
    file = folder / "open_clip_config.json"
    where, config = f"{file}: preprocess_cfg", read_json(file).get("preprocess_cfg") or {}
  else:
    where, config = _image_processor(folder)
    if config is None:
      return None if kind in _NPZ else Preprocessing(where, kind, {}, missing=True)
  if not isinstance(config, Mapping):
    raise ValueError(f"{where}: {str(config)[:80]!r} is not an object")
  return Preprocessing(where, kind, config)


def stated(given: Preprocessing | None) -> View | None:
  """Returns the view of images that the section means; None without one, and for NaFlex.

  A key that the section leaves out means the default of the library that wrote it.

  Raises:
    ValueError: for a view that config.data cannot give, with the file and the key.
  """
  # NaFlex sees patches of the image's own shape.
  if given is None or given.kind.startswith("siglip2"):
    return None
  try:
    if given.kind == "open_clip":
      size, options, left_out = _open_clip(given.config)
    else:
      size, options, left_out = _hugging_face(given.config, given.kind)
  except ValueError as error:
    raise ValueError(
      f"{given.where}: {error}. If another view is right, remove the key there and set"
      " config.data.resize"
    ) from error
  size = None if given.missing else size
  return View(given.where, options, size, given.where, left_out, given.missing)


def with_size(view: View | None, size: Any, where: str) -> View | None:
  """Returns the view with the size of the images that the tower was made for, if it lacks one.

  Args:
    view: what the section about images states.
    size: image_size of the tower's config: a number, or a list of two equal ones.
    where: the file of this config; "" if no file states the size.
  """
  side = size[0] if isinstance(size, list | tuple) and len({*size}) == 1 else size
  if type(side) is not int or (view is not None and view.size is not None):
    return view
  return (view or View(where, {}, None, ""))._replace(size=side, size_where=where)


def _image_processor(folder: pathlib.Path) -> tuple[str, Any]:
  """The file of transformers' image processor, and its content; None without a file.

  transformers 5 writes the image processor into the file of the whole processor.
  """
  file = folder / "preprocessor_config.json"
  if file.is_file():
    return str(file), read_json(file)
  whole = folder / "processor_config.json"
  config = read_json(whole).get("image_processor") if whole.is_file() else None
  return (f"{whole}: image_processor", config) if config else (str(file), None)


def _open_clip(config: Mapping[str, Any]) -> tuple[int | None, dict[str, Any], tuple[str, ...]]:
  """(size, options, those left out) of a preprocess_cfg; null means the default, as there."""
  given = {key: value for key, value in config.items() if value is not None}
  _refuse_unknown(given, _OPEN_CLIP)
  if given.get("mode", "RGB") != "RGB":
    raise ValueError(f"mode: {given['mode']!r}; known: 'RGB'")
  # The defaults of open_clip's PreprocessCfg, 3.3.
  mode, fill = given.get("resize_mode", "shortest"), given.get("fill_color", 0)
  if mode not in ("shortest", "squash", "longest"):
    raise ValueError(f"resize_mode: {str(mode)[:80]!r}; known: 'shortest', 'squash', 'longest'")
  if mode == "longest" and fill not in (0, [0, 0, 0]):
    raise ValueError(f"resize_mode: 'longest', with fill_color={str(fill)[:80]}; known: 0")
  interpolation = _filter("interpolation", given.get("interpolation", "bicubic"))
  keys = {"resize": "resize_mode", "interpolation": "interpolation"}
  return (
    _square("size", given["size"]) if "size" in given else None,
    dict(resize=mode, interpolation=interpolation),
    tuple(option for option, key in keys.items() if key not in given),
  )


def _hugging_face(
  config: Mapping[str, Any], kind: str
) -> tuple[int | None, dict[str, Any], tuple[str, ...]]:
  """(size, options, those left out) of a preprocessor_config.json; null means the default."""
  given = {key: value for key, value in config.items() if value is not None}
  for key in _OFF:
    if given.get(key):
      raise ValueError(f"{key}: {str(given[key])[:80]}; known: false")
  _refuse_unknown(given, (*_HUGGING_FACE, *_HARMLESS, *_OFF))
  for key in ("do_rescale", "do_normalize", "do_resize"):
    if given.get(key, True) is False:
      raise ValueError(f"{key}: false; known: true")
  factor = given.get("rescale_factor", 1 / 255)
  if not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-3:
    raise ValueError(f"rescale_factor: {str(factor)[:80]}; known: {1 / 255}")
  processor = _processor(given, kind)
  full = _PROCESSORS.get(processor, {}) | given
  size, options = _resized(full)
  if "resample" in full:
    options["interpolation"] = _filter("resample", full["resample"])
  if not {"size", "crop_size"} & given.keys() and processor not in _ANY_SIZE:
    size = None  # that of the tower
  keys = {"resize": "size", "resize_edge": "size", "interpolation": "resample"}
  return size, options, tuple(x for x in options if keys[x] not in given)


def _processor(config: Mapping[str, Any], kind: str) -> str:
  """The image processor of transformers without the end of its name; "" if it is unknown."""
  named = config.get("image_processor_type") or config.get("feature_extractor_type")
  if not named:
    return _PROCESSOR.get(kind, "")
  return re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", str(named))


def _resized(config: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
  """(size, options of the resize) of an image processor with its defaults."""
  size, crop = config.get("size"), config.get("do_center_crop")
  if size is None or (crop is None and not isinstance(size, Mapping)):
    return (_square("crop_size", config["crop_size"]) if crop else None), {}
  shortest = size.get("shortest_edge") if isinstance(size, Mapping) else size if crop else None
  if isinstance(size, Mapping) and not shortest and not {"height", "width"} <= size.keys():
    raise ValueError(f"size: {str(dict(size))[:80]}; known: shortest_edge, or height and width")
  if shortest is None:
    side = _square("size", size)
    if crop and _square("crop_size", config.get("crop_size", size)) != side:
      raise ValueError(f"size: {side} is squashed and then cropped to {config['crop_size']}")
    return side, dict(resize="squash")
  edge = _square("size", shortest)
  if crop is False:
    raise ValueError("do_center_crop: false with a shortest edge: images would not be square")
  side = _square("crop_size", config.get("crop_size", edge))
  if side > edge:
    raise ValueError(f"crop_size: {side} is larger than the shortest edge, {edge}")
  return side, dict(resize="shortest", resize_edge=None if side == edge else edge)


def _refuse_unknown(config: Mapping[str, Any], known: tuple[str, ...]) -> None:
  """Raises ValueError for keys that may change the pixels."""
  unknown = [key for key in config if key not in known and config[key] is not None]
  if unknown:
    values = (f"{key!r}: {str(config[key])[:80]!r}" for key in unknown)
    listed = tree.shown(values, sep=", ", width=200)
    raise ValueError(f"{listed}: unknown keys ({len(unknown)})")


def _filter(key: str, value: Any) -> str:
  """Our name of a filter; a number is Pillow's."""
  if not isinstance(value, int | str) or value not in _FILTERS:
    raise ValueError(f"{key}: {str(value)[:80]!r}; known: 2 or 'bilinear', 3 or 'bicubic'")
  return _FILTERS[value]


def _square(key: str, value: Any) -> int:
  """The side of a square that is given as a number, a pair, or a height and a width."""
  if isinstance(value, Mapping):
    value = [value.get("height"), value.get("width")]
  sides = value if isinstance(value, list | tuple) else [value]
  if len(sides) > 2 or len(set(map(str, sides))) != 1 or type(sides[0]) is not int:
    raise ValueError(f"{key}: {str(value)[:80]} is not a square")
  return int(sides[0])


def differences(view: View, data: Mapping[str, Any]) -> list[str]:
  """Returns how config.data differs from the view; each text shows both values.

  Args:
    view: of the checkpoint.
    data: image_size, resize, resize_edge and interpolation.
  """
  theirs = {} if view.missing else dict(view.options)
  if (view.size, theirs.get("resize")) != (data["image_size"], data["resize"]):
    theirs.pop("resize_edge", None)  # the edge belongs to both
  lines = []
  for key, value in theirs.items():
    if data[key] != value:
      means = "leaves it out, which means" if key in view.left_out else "states"
      lines.append(f"config.data.{key} is {data[key]!r}, but {view.where} {means} {value!r}")
  if view.size_where and view.size not in (None, data["image_size"]):
    lines.append(
      f"config.data.image_size is {data['image_size']}, but {view.size_where} states {view.size}"
    )
  return lines
