// Renders every docs/diagrams/*.mmd to two SVGs beside it, for a light and a dark page. The SVGs hold no
// reference to anything outside them, and plain colours only, so that every viewer shows them.
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { renderMermaidSVG } from "beautiful-mermaid";

const folder = join(dirname(fileURLToPath(import.meta.url)), "../../docs/diagrams");
const layout = { font: "Helvetica", padding: 16, nodeSpacing: 28, layerSpacing: 40 };
const themes = {
  light: { bg: "#ffffff", fg: "#1f2328", line: "#57606a", accent: "#0969da", muted: "#57606a", border: "#8c959f" },
  dark: { bg: "#0d1117", fg: "#e6edf3", line: "#8b949e", accent: "#58a6ff", muted: "#9ea7b3", border: "#6e7681" },
};

for (const file of readdirSync(folder).filter((name) => name.endsWith(".mmd")).sort()) {
  const source = readFileSync(join(folder, file), "utf8");
  for (const [theme, colors] of Object.entries(themes)) {
    const target = file.replace(/\.mmd$/, `-${theme}.svg`);
    const svg = renderMermaidSVG(source, { ...layout, ...colors });
    writeFileSync(join(folder, target), plain(svg) + "\n");
    console.log(`docs/diagrams/${target}`);
  }
}

// The renderer colours by CSS variables, which many SVG viewers do not know: puts each one's value in its place.
function plain(svg) {
  const values = new Map([...svg.matchAll(/(--[\w-]+):\s*([^;"]+)/g)].map(([, name, value]) => [name, value.trim()]));
  const resolve = (text) => {
    const variable = text.match(/^var\((--[\w-]+)(?:,\s*(.+))?\)$/);
    if (variable) return resolve(values.get(variable[1]) ?? variable[2]);
    const mix = text.match(/^color-mix\(in srgb, (var\([^)]+\)) (\d+)%, (var\([^)]+\))\)$/);
    return mix ? mixed(resolve(mix[1]), resolve(mix[3]), Number(mix[2]) / 100) : text;
  };
  return svg
    .replace(/@import url\([^)]*\);\s*/g, "")
    .replace(/^\s*svg \{[^}]*\}\n/m, "")
    .replace(/style="--bg:[^"]*"/, `style="background:${values.get("--bg")}"`)
    .replace(/var\(--[\w-]+\)/g, resolve);
}

function mixed(first, second, share) {
  const parts = (color) => [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
  const other = parts(second);
  const channels = parts(first).map((value, at) => Math.round(value * share + other[at] * (1 - share)));
  return "#" + channels.map((value) => value.toString(16).padStart(2, "0")).join("");
}
