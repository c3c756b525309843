import { h } from "./dom.js";

/**
 * Images out of sheets: tiles(place) is a canvas with as many pixels as the image has, drawn once its sheet is there.
 * The style sheet enlarges it without smoothing.
 */
export function openTiles(layout, urls) {
  const { width, height, columns, tiles, pitchX, pitchY } = layout;
  const sheets = urls.map(() => null);
  const sheet = (number) => {
    sheets[number] ??= new Promise((done, failed) => {
      const image = new Image();
      image.onload = () => done(image);
      image.onerror = () => failed(new Error(`the images ${urls[number]} are missing: keep them beside the page`));
      image.src = urls[number];
    });
    return sheets[number];
  };
  const tile = (place) => {
    const canvas = h("canvas", { width, height, "aria-hidden": "true" });
    const within = place % tiles;
    const x = (within % columns) * pitchX;
    const y = Math.floor(within / columns) * pitchY;
    const drawn = sheet(Math.floor(place / tiles)).then((image) => {
      canvas.getContext("2d").drawImage(image, x, y, width, height, 0, 0, width, height);
      canvas.dataset.drawn = place;
    });
    drawn.catch((error) => canvas.dispatchEvent(new CustomEvent("missing", { detail: error.message, bubbles: true })));
    return canvas;
  };
  /** Fetch what will be needed soon. */
  tile.prepare = () => urls.forEach((_, number) => sheet(number).catch(() => {}));
  return tile;
}
