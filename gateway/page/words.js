// Numbers, times and names as the page says them.

export const number = (value) => (value ?? 0).toLocaleString("en-US", { maximumFractionDigits: 1 });
export const percent = (share) => `${(100 * (share ?? 0)).toFixed(0)} %`;

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 100) return `${value.toFixed(0)} s`;
  return value >= 1 ? `${value.toFixed(2)} s` : `${(value * 1000).toFixed(1)} ms`;
}

export const clock = (at) => (at ? new Date(at * 1000).toLocaleTimeString("en-GB") : "–");
export const day = (at) => (at ? new Date(at * 1000).toLocaleString("en-GB") : "–");

export function plain(value) {
  if (value === null || value === undefined || value === "") return "–";
  if (typeof value === "number") return Number.isInteger(value) ? number(value) : value.toPrecision(4);
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value)) return value.map(plain).join(", ") || "–";
  if (typeof value === "object") return Object.entries(value).map(([name, each]) => `${name} ${plain(each)}`).join(", ") || "–";
  return String(value);
}

// A mean of times and the interval that holds it 95 times in 100 (protocol: Times; of logarithms).
export function mean(times) {
  if (!times?.num) return "–";
  const log = times.log_sum / times.num;
  const middle = seconds(Math.exp(log));
  if (times.num < 2) return middle;
  const variance = Math.max(0, (times.log_square_sum - times.num * log * log) / (times.num - 1));
  const half = 1.96 * Math.sqrt(variance / times.num);
  return `${middle} (${seconds(Math.exp(log - half))} to ${seconds(Math.exp(log + half))})`;
}
