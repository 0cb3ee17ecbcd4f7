"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const views = new Map();
  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const colours = (letter, count) => Array.from({ length: count }, (_, i) => colour(letter + i));

  function themeConfig() {
    const [ink, soft, line] = ["ink", "soft", "line"].map(colour);
    return {
      background: "transparent",
      font: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
      view: { stroke: null },
      axis: {
        labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line,
        titleFontWeight: 400, labelFontSize: 11, titleFontSize: 12, gridOpacity: 0.7,
        titlePadding: 8,
      },
      axisX: { grid: false, tickCount: 5 },
      axisY: { domain: false, ticks: false, tickCount: 5 },
      legend: { labelColor: ink, titleColor: soft, titleFontWeight: 400, labelFontSize: 12 },
      range: {
        category: colours("c", 6), heatmap: colours("h", 5), diverging: colours("d", 5),
      },
      mark: { color: colour("c0") },
      style: { reference: { stroke: soft, color: soft, fill: soft } },
    };
  }

  // A chart is drawn when it comes near the screen, and again when the theme changes.
  async function draw(plot) {
    const key = plot.dataset.chart;
    const slider = document.querySelector(`[data-scrubs="${key}"]`);
    const isHeatmap = "params" in data.charts[key];
    const drawn = await window.vegaEmbed(plot, data.charts[key], {
      mode: "vega-lite", actions: false, config: themeConfig(),
      renderer: isHeatmap ? "canvas" : "svg",
    });
    views.set(key, drawn);
    if (slider) await drawn.view.signal("frame", Number(slider.value)).runAsync();
    plot.dataset.drawn = "yes";
  }
  const plots = [...document.querySelectorAll(".plot")];
  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      draw(target);
    }
  }, { rootMargin: "600px" });
  function drawAll() {
    for (const plot of plots) {
      views.get(plot.dataset.chart)?.finalize();
      views.delete(plot.dataset.chart);
      delete plot.dataset.drawn;
      near.unobserve(plot);
      near.observe(plot);
    }
  }

  function scrub(slider) {
    const key = slider.dataset.scrubs;
    const frames = JSON.parse(slider.dataset.frames);
    document.querySelector(`[data-frame-of="${key}"]`).textContent = frames[slider.value];
    views.get(key)?.view.signal("frame", Number(slider.value)).runAsync();
  }
  document.addEventListener("input", ({ target }) => {
    if (!target.matches("[data-scrubs]")) return;
    scrub(target);
    // Load and number of experts of one run are of the same moments: both sliders move.
    const [what, number] = target.dataset.scrubs.split("-");
    const other = { load: "histogram", histogram: "load" }[what];
    const twin = document.querySelector(`[data-scrubs="${other}-${number}"]`);
    if (!twin || twin.max !== target.max) return;
    twin.value = target.value;
    scrub(twin);
  });

  class TokenView {
    constructor(element, passage) {
      this.element = element;
      this.passage = passage;
      this.spans = passage.text.map((text, index) => {
        const span = document.createElement("span");
        span.textContent = text.replace(/\n/g, "\u21b5\n") || "\u2205";
        span.setAttribute("role", "option");
        span.tabIndex = index === 0 ? 0 : -1;
        span.addEventListener("pointerenter", () => this.show(index));
        span.addEventListener("focus", () => this.show(index));
        span.addEventListener("click", () => this.show(index));
        return span;
      });
      const paragraph = element.querySelector(".passage");
      paragraph.append(...this.spans);
      paragraph.addEventListener("keydown", (event) => {
        const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        const next = move && this.spans[this.here + move];
        if (!next) return;
        event.preventDefault();
        next.focus();
      });
      element.addEventListener("change", () => this.paint());
      this.here = 0;
      this.paint();
      this.show(0);
    }

    // Weights of the colour: from the least value, or 0 for nats, to one that few tokens exceed.
    paint() {
      const measure = this.element.querySelector("input:checked").value;
      const values = this.passage[measure];
      const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
      const low = measure === "k" ? sorted[0] : 0;
      const high = sorted[Math.floor(0.97 * (sorted.length - 1))];
      const unit = measure === "k" ? "" : " nats";
      this.element.querySelector(".low").textContent = `${low.toPrecision(3)}${unit}`;
      this.element.querySelector(".high").textContent = `${high.toPrecision(3)}${unit} or more`;
      this.spans.forEach((span, index) => {
        const weight = (values[index] - low) / (high - low || 1);
        span.style.setProperty("--w", `${Math.round(70 * Math.min(1, Math.max(0, weight || 0)))}%`);
      });
    }

    show(index) {
      const { passage, spans } = this;
      spans[this.here].classList.remove("here");
      spans[this.here].tabIndex = -1;
      spans[index].classList.add("here");
      spans[index].tabIndex = 0;
      this.here = index;
      const next = index + 1 < passage.text.length ? JSON.stringify(passage.text[index + 1]) : "the end";
      const number = (name) => (passage[name][index] ?? NaN).toPrecision(3);
      this.element.querySelector(".about").textContent =
        `Token ${index + 1}: ${JSON.stringify(passage.text[index])}, followed by ${next}.\n` +
        `${number("k")} active experts on average over the layers; KL ${number("kl")} nats.\n` +
        `Surprise at what follows: student ${number("student_nll")}, teacher ${number("teacher_nll")} nats.`;
      this.drawExperts();
    }

    drawExperts() {
      const canvas = this.element.querySelector("canvas");
      const layers = this.passage.active[this.here].map((hex) => BigInt(`0x${hex}`));
      const experts = this.passage.num_experts;
      const width = canvas.clientWidth || 320;
      const row = Math.max(3, Math.min(12, Math.floor((window.innerWidth < 740 ? 130 : 300) / layers.length)));
      const scale = window.devicePixelRatio || 1;
      canvas.width = width * scale;
      canvas.height = row * layers.length * scale;
      canvas.style.height = `${row * layers.length}px`;
      const context = canvas.getContext("2d");
      context.scale(scale, scale);
      const cell = (width * 0.8) / experts;
      const [on, off, bar] = ["c0", "line", "c1"].map(colour);
      layers.forEach((bits, layer) => {
        let count = 0;
        for (let expert = 0; expert < experts; expert += 1) {
          const active = Boolean((bits >> BigInt(expert)) & 1n);
          count += active;
          context.globalAlpha = active ? 1 : 0.45;
          context.fillStyle = active ? on : off;
          context.fillRect(expert * cell, layer * row, Math.max(0.6, cell - 1), row - 1);
        }
        context.globalAlpha = 0.85;
        context.fillStyle = bar;
        context.fillRect(width * 0.82, layer * row, (width * 0.18 * count) / experts, row - 1);
      });
    }
  }

  const tokenViews = Object.entries(data.passages).map(
    ([key, passage]) => new TokenView(document.getElementById(key), passage),
  );

  function applyTheme() {
    root.dataset.theme = chosen ?? (dark.matches ? "dark" : "light");
    drawAll();
    tokenViews.forEach((view) => view.drawExperts());
  }
  document.getElementById("theme").addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    applyTheme();
  });
  dark.addEventListener("change", applyTheme);
  window.addEventListener("resize", () => tokenViews.forEach((view) => view.drawExperts()));
  applyTheme();
})();
