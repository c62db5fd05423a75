// Strict JSON: no duplicate keys, no lone surrogates, integers told from other numbers (sections 4 and 5).

// An integer as it is spelled becomes a BigInt, any other number a Number, an object one without a prototype.
export function parse(text) {
  let at = 0;
  const wrong = (what) => new SyntaxError(`${what} at ${at}`);
  const space = () => { while (" \t\n\r".includes(text[at]) && at < text.length) at++; };
  const token = (pattern) => {
    pattern.lastIndex = at;
    const found = pattern.exec(text)?.[0];
    if (found !== undefined) at += found.length;
    return found;
  };
  const expect = (character) => {
    space();
    if (text[at] !== character) throw wrong(`no ${character}`);
    at++;
  };
  const string = () => {
    const found = token(/"(?:[^"\\\u0000-\u001f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"/y);
    if (found === undefined) throw wrong("no string");
    const value = JSON.parse(found);
    if (!value.isWellFormed()) throw wrong("a lone surrogate");
    return value;
  };
  const members = (close, member) => {
    at++;
    space();
    if (text[at] === close) return void at++;
    for (;;) {
      member();
      space();
      if (text[at] === close) return void at++;
      expect(",");
      space();
    }
  };
  const value = (levels) => {
    if (levels > 1000) throw wrong("nested too deeply");
    space();
    if (text[at] === "{") {
      const object = Object.create(null);
      members("}", () => {
        const key = string();
        if (key in object) throw Object.assign(wrong(`${key} twice`), { duplicate: true });
        expect(":");
        object[key] = value(levels + 1);
      });
      return object;
    }
    if (text[at] === "[") {
      const list = [];
      members("]", () => list.push(value(levels + 1)));
      return list;
    }
    if (text[at] === '"') return string();
    const number = token(/-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?/y);
    if (number !== undefined) return /[.eE]/.test(number) ? Number(number) : BigInt(number);
    const word = token(/true|false|null/y);
    if (word === undefined) throw wrong("no value");
    return JSON.parse(word);
  };
  const whole = value(1);
  space();
  if (at < text.length) throw wrong("more than one value");
  return whole;
}

// RFC 8785. JavaScript's own numbers, strings and order of strings are those that it prescribes.
export function canonical(value, levels = 32) {
  if (typeof value === "bigint") {
    const spelled = String(Number(value));
    if (spelled !== String(value)) throw new RangeError(`double precision rounds ${spelled}`);
    return spelled;
  }
  if (typeof value === "number") {
    if (!Number.isFinite(value)) throw new RangeError("a number beyond double precision");
    return String(value === 0 ? 0 : value);
  }
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  if (levels === 0) throw new RangeError("more than 32 levels");
  if (Array.isArray(value)) return `[${value.map((item) => canonical(item, levels - 1)).join(",")}]`;
  const keys = Object.keys(value).sort();
  return `{${keys.map((key) => `${JSON.stringify(key)}:${canonical(value[key], levels - 1)}`).join(",")}}`;
}
