// Opens a page in headless Chromium and writes what a person would stumble over as JSON: errors, overflow, axe's findings.
// Reads from standard input: {"chromium": path, "page": path, "widths": [...], "shots": folder or null}
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";

const require = createRequire(`${process.cwd()}/`);
const puppeteer = require("puppeteer-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const job = JSON.parse(readFileSync(0, "utf8"));
const browser = await puppeteer.launch({ executablePath: job.chromium, args: ["--no-sandbox", "--disable-gpu"] });
const found = [];
for (const scheme of ["light", "dark"]) {
  for (const width of job.widths) {
    const page = await browser.newPage();
    const errors = [], requests = [];
    page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
    page.on("pageerror", (error) => errors.push(String(error)));
    page.on("request", (request) => requests.push(request.url()));
    await page.setViewport({ width, height: 900 });
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
    await page.goto(`file://${job.page}`);
    const overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
    if (job.shots) await page.screenshot({ path: `${job.shots}/${scheme}-${width}.png`, fullPage: true });
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => axe.run());
    const sorted = await page.evaluate(() => {
      const table = document.querySelector("table.sortable");
      if (!table) return null;
      const column = 2;
      const button = table.tHead.rows[0].cells[column].querySelector("button");
      const values = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[column].dataset.value));
      button.click();
      const up = values();
      button.click();
      return { up, down: values(), state: table.tHead.rows[0].cells[column].getAttribute("aria-sort") };
    });
    found.push({
      scheme, width, overflow, errors, sorted,
      requests: requests.filter((url) => !url.startsWith("file:") && !url.startsWith("data:")),
      violations: violations.map((v) => `${v.id}: ${v.help}: ${v.nodes.map((n) => n.target.join(" ")).slice(0, 5).join("; ")}`),
    });
    await page.close();
  }
}
if (job.pdf) {
  const page = await browser.newPage();
  await page.goto(`file://${job.page}`);
  await page.pdf({ path: job.pdf, format: "A4", margin: { top: "15mm", bottom: "15mm", left: "15mm", right: "15mm" } });
}
await browser.close();
console.log(JSON.stringify(found));
