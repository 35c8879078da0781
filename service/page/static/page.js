// The page's behaviour: choosing an image, asking, and putting the parts that the service has rendered in their place.

const $ = (id) => document.getElementById(id);
const CHOICES = new Set(["image/png", "image/jpeg", "image/webp"]);

let image = null; // the Blob that will be sent
let unscaled = null; // a decoded image of a size that the model does not take
let running = null; // the AbortController of the request under way: a newer one ends it, here and in the service

document.documentElement.classList.add("js");

function headers(more = {}) {
  const key = $("key").value.trim();
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function fetchPart(address, options = {}) {
  const answer = await fetch(address, { ...options, headers: headers(options.headers) });
  if (answer.ok) return answer;
  let detail = answer.statusText;
  try {
    detail = (await answer.json()).detail;
  } catch {
    // not a problem document: a proxy's answer
  }
  const wait = answer.headers.get("Retry-After");
  throw new Error(`${detail} (${answer.status})${wait ? `; try again in ${wait} s` : ""}`);
}

const parse = (html) => new DOMParser().parseFromString(html, "text/html").body;

function put(target, html, focus) {
  target.replaceChildren(...parse(html).childNodes);
  const heading = target.querySelector("[tabindex='-1']");
  if (focus && heading) heading.focus({ preventScroll: true });
  reveal(target);
}

function reveal(element) {
  const smooth = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (element.getBoundingClientRect().top > innerHeight * 0.6 || element.getBoundingClientRect().top < 0) {
    element.scrollIntoView({ behavior: smooth ? "smooth" : "auto", block: "start" });
  }
}

function complain(target, error) {
  const box = parse('<div class="problem" role="alert"><h2></h2><p></p></div>').firstChild;
  box.firstChild.textContent = "No answer";
  box.lastChild.textContent = error.message;
  target.replaceChildren(box);
  reveal(target);
}

async function ask(target, address, busy) {
  running?.abort();
  const mine = (running = new AbortController());
  target.setAttribute("aria-busy", "true");
  $("status").textContent = busy;
  try {
    const type = CHOICES.has(image.type) ? image.type : "application/octet-stream";
    const answer = await fetchPart(address, {
      method: "POST", body: image, headers: { "Content-Type": type }, signal: mine.signal,
    });
    put(target, await answer.text(), true);
  } catch (error) {
    if (error.name !== "AbortError") complain(target, error);
  } finally {
    if (running === mine) {
      running = null;
      $("status").textContent = "";
    }
    if (running === null || !mine.signal.aborted) target.removeAttribute("aria-busy");
  }
}

// The default is not named: whoever may not choose may still ask.
function defense() {
  const chosen = $("defense")?.selectedOptions[0];
  return chosen && !("default" in chosen.dataset) ? { defense: chosen.value } : {};
}

function classify() {
  if (!image) {
    $("file").focus();
    return complain($("result"), new Error(unscaled ? "Scale the image first." : "Choose an image first."));
  }
  return ask($("result"), `page/answer?${new URLSearchParams(defense())}`, "Asking");
}

function attack() {
  if (!image) {
    $("file").focus();
    return complain($("lab-result"), new Error("Choose an image first."));
  }
  const options = {
    ...defense(),
    attack: new FormData($("attack")).get("attack"),
    epsilon: `${$("epsilon").value}/255`,
  };
  return ask($("lab-result"), `page/lab?${new URLSearchParams(options)}`, "Attacking");
}

// Choosing an image.

function show(blob, text, pixelated) {
  const preview = $("preview");
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(blob);
  preview.classList.toggle("pixels", pixelated);
  preview.hidden = false;
  $("chosen").textContent = text;
}

async function choose(blob, name) {
  image = unscaled = null;
  $("scaling").hidden = true;
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    // Whatever this browser cannot read: the service says what is wrong with it.
    image = blob;
    $("preview").hidden = true;
    $("chosen").textContent = name;
    return classify();
  }
  const { width, height, exact } = $("model").dataset;
  const size = `${bitmap.width}\u202f\u00d7\u202f${bitmap.height} px`;
  show(blob, `${name}, ${size}`, Math.max(bitmap.width, bitmap.height) <= 64);
  if (exact === "true" && (bitmap.width !== Number(width) || bitmap.height !== Number(height))) {
    unscaled = { bitmap, name };
    $("scaling-text").textContent =
      `This image is ${size}; the model takes exactly ${width}\u202f\u00d7\u202f${height} px.`;
    $("scale").hidden = false;
    $("scaling").hidden = false;
    $("scale").focus();
    return undefined;
  }
  image = blob;
  return classify();
}

async function scale() {
  const { bitmap, name } = unscaled;
  const width = Number($("model").dataset.width);
  const height = Number($("model").dataset.height);
  const factor = Math.min(bitmap.width / width, bitmap.height / height);
  const cut = { width: width * factor, height: height * factor };
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // as the service does with what is transparent
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, (bitmap.width - cut.width) / 2, (bitmap.height - cut.height) / 2, cut.width, cut.height,
    0, 0, width, height);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  const from = `${bitmap.width}\u202f\u00d7\u202f${bitmap.height}`;
  await choose(blob, name);
  $("scaling-text").textContent =
    `Scaled in this browser from ${from} px, the middle of it. The model sees what the picture above shows.`;
  $("scale").hidden = true;
  $("scaling").hidden = false;
}

async function chooseSample(button) {
  try {
    const answer = await fetchPart(`page/exemplars/${button.dataset.exemplar}.png`);
    await choose(await answer.blob(), `training image ${button.dataset.exemplar}`);
  } catch (error) {
    complain($("result"), error);
  }
}

function chooseAttacked() {
  const data = $("adversarial").src.split(",")[1];
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  return choose(new Blob([bytes], { type: "image/png" }), "the attacked image");
}

// What the page says of the bundle, which may need a key.

async function refresh() {
  try {
    const html = await (await fetchPart("page/about")).text();
    for (const part of [...parse(html).children]) $(part.id)?.replaceWith(part);
    describe();
    await fillSamples();
  } catch (error) {
    complain($("result"), error);
  }
}

function describe() {
  const text = $("defense-text");
  if (text) text.textContent = $("defense").selectedOptions[0].dataset.text;
}

async function fillSamples() {
  const waiting = [...document.querySelectorAll("img[data-src]")];
  await Promise.all(waiting.map(async (picture) => {
    try {
      picture.src = URL.createObjectURL(await (await fetchPart(picture.dataset.src)).blob());
      delete picture.dataset.src;
    } catch {
      picture.closest("li").remove();
    }
  }));
}

// Wiring.

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  classify();
});
$("file").removeAttribute("required"); // an image may come from elsewhere
$("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) choose(file, file.name);
});
$("scale").addEventListener("click", scale);
$("key").addEventListener("change", refresh);
$("attack")?.addEventListener("submit", (event) => {
  event.preventDefault();
  attack();
});
$("epsilon")?.addEventListener("input", () => {
  $("epsilon-said").textContent = `${$("epsilon").value}/255`;
});
document.addEventListener("change", (event) => {
  if (event.target.id === "defense") describe();
});
document.addEventListener("click", (event) => {
  const sample = event.target.closest("[data-exemplar]");
  if (sample) chooseSample(sample);
  if (event.target.id === "use") chooseAttacked();
});
for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(type, (event) => {
    event.preventDefault(); // also beside the box: the browser would leave the page for the file
    $("drop").classList.toggle("over", type.startsWith("drago") || type === "dragenter");
    if (type === "dragleave" || type === "drop") $("drop").classList.remove("over");
    const file = type === "drop" && event.dataTransfer.files[0];
    if (file) choose(file, file.name);
  });
}
describe();
fillSamples();
