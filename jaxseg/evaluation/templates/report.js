"use strict";
for (const slider of document.querySelectorAll("input[type=range]")) {
  const plane = slider.closest(".plane");
  const frame = plane.querySelector(".frame");
  const output = plane.querySelector("output");
  const slices = slider.dataset.slices.split(",");
  const columns = Number(slider.dataset.columns);
  const show = () => {
    const index = Number(slider.value);
    frame.style.setProperty("--column", index % columns);
    frame.style.setProperty("--row", Math.floor(index / columns));
    output.value = slices[index];
  };
  slider.addEventListener("input", show);
  show(); // a reload may have kept another place of the slider
}
for (const box of document.querySelectorAll("input[data-layer]")) {
  const layers = box.closest(".case").querySelectorAll("img." + box.dataset.layer);
  const show = () => layers.forEach((layer) => { layer.hidden = !box.checked; });
  box.addEventListener("change", show);
  show();
}
