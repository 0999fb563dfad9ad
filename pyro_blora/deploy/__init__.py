"""A trained model out, as PEFT, transformers or this package reads it; a folder in, and predictions on new texts."""

from typing import TYPE_CHECKING

from ..lazily import lazily

if TYPE_CHECKING:
    from .answering import Answers as Answers
    from .draw_tree import export_draws as export_draws
    from .exporting import export_run as export_run
    from .loaded_model import Model as Model
    from .merged import merge as merge
    from .opening import load as load
    from .packing import pack as pack
    from .peft import export as export
    from .peft import plain_backbone as plain_backbone
    from .peft import require_exportable as require_exportable
    from .pushing import push as push
else:
    __getattr__, __dir__, __all__ = lazily(__name__, __file__)
