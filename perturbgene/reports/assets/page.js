"use strict";
// The map of cells with its colors and legend, and the sliders of thresholds. Everything is read from #data.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A63D2", "#A6761D", "#E7298A",
    "#66A61E", "#1B9E9E", "#B22222", "#7F8FA6", "#B8A800", "#4B6CB7", "#C06C84"];
  const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  const HINT = "Point at a cell to read what it is.";

  const percent = (share) => share === null ? "–" : `${(100 * share).toFixed(1)} %`;
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const words = (text) => {
    const raw = bytes(text);
    return Uint16Array.from({ length: raw.length / 2 }, (_, i) => raw[2 * i] + 256 * raw[2 * i + 1]);
  };
  const element = (tag, text = "") => Object.assign(document.createElement(tag), { textContent: text });
  const shape = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const labelColor = (code, label) => {
    if (label === "unknown") return "#8c8c8c";
    if (code <= PALETTE.length) return PALETTE[code - 1];
    return `hsl(${(code * 137.5) % 360} ${45 + (code % 3) * 15}% ${42 + (code % 4) * 7}%)`;
  };
  const stepColor = (code) => {
    const at = Math.max(0, code - 1) / 254 * (VIRIDIS.length - 1), low = Math.min(Math.floor(at), VIRIDIS.length - 2);
    const mixed = VIRIDIS[low].map((from, i) => Math.round(from + (VIRIDIS[low + 1][i] - from) * (at - low)));
    return `rgb(${mixed.join(" ")})`;
  };
  const rounded = (value) => String(Number(value.toPrecision(3)));

  const showMap = (map) => {
    const canvas = document.getElementById("cells"), legend = document.getElementById("legend");
    const select = document.getElementById("color"), hover = document.getElementById("hover");
    const x = words(map.x), y = words(map.y);
    for (const one of map.columns) one.codes = one.kind === "label" ? words(one.codes) : bytes(one.codes);
    let column = map.columns[0], alone = 0, places = [];

    const draw = () => {
      const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
      canvas.width = width * ratio;
      canvas.height = height * ratio;
      const pen = canvas.getContext("2d"), faint = style("--faint");
      const tall = Math.min(height - 20, (width - 20) / map.aspect), wide = tall * map.aspect;
      pen.scale(ratio, ratio);
      const size = Math.max(2, Math.min(7, 130 / Math.sqrt(map.count)));
      const colors = column.kind === "label" ? ["", ...column.labels].map((label, code) => labelColor(code, label))
        : Array.from({ length: 256 }, (_, code) => stepColor(code));
      colors[0] = faint;
      places = Array.from(x, (_, i) => [
        (width - wide) / 2 + x[i] / 65535 * wide, (height - tall) / 2 + (1 - y[i] / 65535) * tall,
      ]);
      const dot = (i, color) => {
        pen.fillStyle = color;
        if (size < 3) return pen.fillRect(places[i][0] - size / 2, places[i][1] - size / 2, size, size);
        pen.beginPath();
        pen.arc(places[i][0], places[i][1], size / 2, 0, 7);
        return pen.fill();
      };
      const isAlone = (i) => !alone || column.codes[i] === alone;
      for (let i = 0; i < map.count; i++) if (!isAlone(i)) dot(i, faint);
      for (let i = 0; i < map.count; i++) if (isAlone(i)) dot(i, colors[column.codes[i]]);
      canvas.dataset.drawn = column.name;
    };

    const value = (i) => {
      const code = column.codes[i];
      if (!code) return "not known";
      if (column.kind === "label") return column.labels[code - 1];
      return rounded(column.low + (code - 1) / 254 * (column.high - column.low));
    };

    const showScale = () => {
      const bar = shape("svg", { class: "scale", viewBox: "0 0 255 10", preserveAspectRatio: "none" });
      for (let code = 1; code < 256; code++) {
        bar.append(shape("rect", { x: code - 1, width: 1.5, height: 10, fill: stepColor(code) }));
      }
      const ends = element("div");
      ends.className = "ends";
      ends.append(element("span", rounded(column.low)), element("span", rounded(column.high)));
      legend.append(bar, ends);
    };

    const showLabels = () => {
      const counts = new Array(column.labels.length + 1).fill(0);
      for (const code of column.codes) counts[code]++;
      for (const code of column.labels.map((_, i) => i + 1).sort((a, b) => counts[b] - counts[a])) {
        const label = column.labels[code - 1], button = element("button");
        const dot = shape("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" });
        dot.append(shape("circle", { cx: 5, cy: 5, r: 5, fill: labelColor(code, label) }));
        button.type = "button";
        button.setAttribute("aria-pressed", "false");
        button.append(dot, element("span", label), element("small", counts[code].toLocaleString("en-US")));
        button.addEventListener("click", () => {
          alone = alone === code ? 0 : code;
          for (const other of legend.querySelectorAll("button")) {
            other.setAttribute("aria-pressed", String(other === button && alone === code));
          }
          draw();
        });
        button.tabIndex = legend.childElementCount ? -1 : 0;
        legend.append(button);
      }
      if (counts[0]) legend.append(element("small", `${counts[0].toLocaleString("en-US")} cells without a value`));
    };

    const show = () => {
      column = map.columns[Number(select.value)];
      alone = 0;
      legend.replaceChildren();
      if (column.kind === "label") showLabels(); else showScale();
      draw();
    };
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
      let nearest = -1, least = 144;
      places.forEach(([cx, cy], i) => {
        const far = (cx - px) ** 2 + (cy - py) ** 2;
        if (far < least) [least, nearest] = [far, i];
      });
      hover.textContent = nearest < 0 ? HINT : `${map.names[nearest]}: ${value(nearest)}`;
    });
    legend.addEventListener("keydown", (event) => {  // Tab passes the legend by; arrows move within it
      const buttons = [...legend.querySelectorAll("button")], at = buttons.indexOf(document.activeElement);
      const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
      if (at < 0 || to === undefined || !buttons[to]) return;
      event.preventDefault();
      buttons.forEach((button, i) => { button.tabIndex = i === to ? 0 : -1; });
      buttons[to].focus();
    });
    select.addEventListener("change", show);
    window.addEventListener("resize", draw);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    show();
  };

  const showThreshold = (section) => {
    const own = data.phenotypes[Number(section.dataset.number)], slider = section.querySelector(".threshold");
    const reading = document.getElementById(`${section.id}-reading`);
    const marker = document.getElementById(`${section.id}-dot`);
    const bars = section.querySelector(".chart").querySelectorAll(".bar");
    const doubtful = section.querySelectorAll(".doubtful");
    const sum = (counts) => counts.reduce((a, b) => a + b, 0);
    const move = () => {
      const step = Number(slider.value), coverage = own.coverage[step];
      const accuracy = (own.measured ?? own.expected)[step];
      const said = [`${(step / 100).toFixed(2)}: ${percent(coverage)} of the cells keep a label`];
      said.push(`expected accuracy of these ${percent(own.expected[step])}`);
      if (own.measured) said.push(`measured ${percent(own.measured[step])}`);
      reading.textContent = said.join(", ");
      slider.setAttribute("aria-valuetext", reading.textContent);
      bars.forEach((bar, i) => bar.setAttribute("class", i < step ? "bar below" : "bar"));
      const [left, right, bottom, top] = JSON.parse(marker.dataset.places);
      marker.setAttribute("cx", left + (right - left) * coverage);
      marker.setAttribute("cy", accuracy === null ? -20 : bottom + (top - bottom) * accuracy);
      doubtful.forEach((cell, i) => {
        const total = sum(own.types[i]);
        cell.textContent = total ? percent(sum(own.types[i].slice(0, step)) / total) : "";
      });
    };
    slider.addEventListener("input", move);
    move();
  };

  const showPoints = (chart) => {
    const reading = chart.querySelector(".pointed"), hint = reading.textContent, svg = chart.querySelector("svg");
    const dots = [...svg.querySelectorAll(".point")].map((dot) => (
      [Number(dot.getAttribute("cx")), Number(dot.getAttribute("cy")), dot]));
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), unit = svg.viewBox.baseVal.width / box.width;
      const px = (event.clientX - box.left) * unit, py = (event.clientY - box.top) * unit;
      let nearest = null, least = 100;
      for (const [x, y, dot] of dots) {
        const far = (x - px) ** 2 + (y - py) ** 2;
        if (far < least) [least, nearest] = [far, dot];
      }
      svg.querySelectorAll("circle.pointed").forEach((dot) => dot.classList.remove("pointed"));
      nearest?.classList.add("pointed");
      reading.textContent = nearest ? nearest.querySelector("title").textContent : hint;
    });
  };

  let closed = [];  // what is folded is on paper, too
  window.addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const one of closed) one.open = true;
  });
  window.addEventListener("afterprint", () => { for (const one of closed) one.open = false; });

  if (data.map) showMap(data.map);
  document.querySelectorAll(".phenotype").forEach(showThreshold);
  document.querySelectorAll(".chart:has(.point)").forEach(showPoints);
})();
