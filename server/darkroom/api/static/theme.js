"use strict";
// Loaded before the first paint, so that a chosen theme does not flash.
const chosen = localStorage.getItem("darkroom.theme");
if (chosen) document.documentElement.dataset.theme = chosen;
