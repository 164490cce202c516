"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const charts = [...document.querySelectorAll(".chart")];
  const bytes = Uint8Array.from(atob(document.getElementById("plotly").textContent.trim()), (c) => c.charCodeAt(0));
  try {
    const text = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    const script = document.createElement("script");
    script.textContent = text;
    document.head.append(script);
  } catch (error) {
    for (const chart of charts) chart.textContent = data.tooOld;
    return;
  }

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const coloured = (value, theme) => {
    if (typeof value === "string") return data.palette[value] ? data.palette[value][theme] : value;
    if (Array.isArray(value)) return value.map((item) => coloured(item, theme));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item, theme)]));
    return value;
  };
  const draw = (printing) => {
    const theme = dark.matches && !printing ? "dark" : "light";
    for (const chart of charts) {
      const figure = coloured(data.figures[chart.id], theme);
      const width = printing ? 680 : chart.clientWidth;
      const narrow = width < 640;
      for (const trace of figure.data) {
        if (trace.meta && trace.meta.short && narrow) trace.text = trace.meta.short;
      }
      Object.assign(figure.layout, { width, font: { ...figure.layout.font, size: narrow ? 10 : 12 } });
      chart.classList.remove("waiting");
      Plotly.react(chart, figure.data, figure.layout, { displayModeBar: false, responsive: false });
    }
  };
  for (const chart of charts) chart.textContent = "";
  draw(false);
  dark.addEventListener("change", () => draw(false));
  let wait = 0;
  window.addEventListener("resize", () => {
    clearTimeout(wait);
    wait = setTimeout(() => draw(false), 100);
  });
  window.addEventListener("beforeprint", () => draw(true));
  window.addEventListener("afterprint", () => draw(false));
  document.documentElement.dataset.ready = "yes";
})();
