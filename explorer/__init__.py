"""Click a photograph, see who taught the machine: an explorer of influences, as a page and as a notebook widget.

    explore(influences, train, test, model)   the widget, on your own model and data
    gather(...)                               what it shows: a `Payload`, made once, the same for both
    write_page(payload, folder)               the page, index.html and its sheets of images

The rooms, from the ground up: `pictures` (whatever holds images → pixels), `sheets` (pixels → a few image files),
`notes` (what tables say of an image), `sources` (where scores come from, checked), `album` (the images shown),
`rankings` (scores → lists, and how steady they are), `groups` (what pushes a confusion, in look-alikes), `still`,
`payload` (all of it), `page`, `widget`. What the reader sees is written in `web/`, plain ES modules that `bundle`
joins to one. Words and the one sign (positive = helpful) are those of `influence_functions`.
"""

from .page import write_page
from .payload import Extras, Payload, gather
from .widget import Explorer, explore

__all__ = ["Explorer", "Extras", "Payload", "explore", "gather", "write_page"]
