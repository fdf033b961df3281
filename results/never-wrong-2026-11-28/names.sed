s/\b(cuts|num_blocks)=(cuts|[("0-9])/\2/g
s/^from localgrad\.predict import _read/from localgrad.data.pictures import read_picture; from torchvision.transforms.functional import pil_to_tensor; _read = lambda file, channels: pil_to_tensor(read_picture(file, "RGB"))/
s/localgrad\.predict\b/localgrad.train.predict/g
s/from localgrad\.config import read_recipe/from localgrad.recipes import read_recipe/
s/localize\(model, method, \("4",\), example=x, \*\*options\)/localize(model, method, localgrad.cuts.recomputed(("4",), options["recompute"]) if options else ("4",), example=x)/
