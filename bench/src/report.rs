//! Figures, and their spread over several runs.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// Latencies in nanoseconds, up to a minute, with three digits.
#[derive(Debug, Clone)]
pub struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Self {
        let histogram = Histogram::new_with_bounds(1, 60_000_000_000, 3);
        Self(histogram.unwrap_or_else(|_| unreachable!("fixed valid bounds")))
    }
}

impl Latencies {
    /// Adds one.
    pub fn add(&mut self, latency: Duration) {
        self.0.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX).max(1));
    }

    /// Adds all of another.
    pub fn merge(&mut self, other: &Self) {
        // Both have the same bounds.
        let _ = self.0.add(&other.0);
    }

    /// How many were added.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// Milliseconds at a quantile from 0 to 1.
    pub fn at(&self, quantile: f64) -> f64 {
        self.0.value_at_quantile(quantile) as f64 / 1e6
    }
}

/// One measured number.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// What it is.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// The number.
    pub value: f64,
}

/// What one run of one scenario measured, in the order in which it is to be read.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// The scenario and its settings.
    pub scenario: String,
    /// Its figures.
    pub figures: Vec<Figure>,
}

impl Report {
    /// A report without figures.
    pub fn new(scenario: impl Into<String>) -> Self {
        Self { scenario: scenario.into(), figures: Vec::new() }
    }

    /// Adds a figure.
    pub fn add(&mut self, name: &'static str, unit: &'static str, value: f64) {
        self.figures.push(Figure { name, unit, value });
    }

    /// Adds the usual quantiles of latencies, in milliseconds.
    pub fn latencies(&mut self, names: [&'static str; 3], latencies: &Latencies) {
        for (name, quantile) in names.into_iter().zip([0.5, 0.99, 0.999]) {
            self.add(name, "ms", latencies.at(quantile));
        }
    }
}

/// Minimum, median and maximum of a figure over several runs.
#[derive(Debug, Clone, Default)]
pub struct Spread {
    order: Vec<(String, &'static str, &'static str)>,
    values: BTreeMap<(String, &'static str), Vec<f64>>,
}

impl Spread {
    /// Adds a run.
    pub fn add(&mut self, report: &Report) {
        for Figure { name, unit, value } in &report.figures {
            let key = (report.scenario.clone(), *name);
            if !self.values.contains_key(&key) {
                self.order.push((report.scenario.clone(), name, unit));
            }
            self.values.entry(key).or_default().push(*value);
        }
    }

    fn rows(&self) -> impl Iterator<Item = (&str, &'static str, &'static str, [f64; 3], usize)> {
        self.order.iter().map(|(scenario, name, unit)| {
            let mut values = self.values.get(&(scenario.clone(), *name)).cloned().unwrap_or_default();
            values.sort_by(f64::total_cmp);
            let last = values.len().saturating_sub(1);
            let spread = [values[0], values[last / 2], values[last]];
            (scenario.as_str(), *name, *unit, spread, values.len())
        })
    }

    /// A table in Markdown.
    pub fn table(&self) -> String {
        let mut text =
            String::from("| scenario | figure | median | min | max | unit | runs |\n|---|---|---|---|---|---|---|\n");
        for (scenario, name, unit, [min, median, max], runs) in self.rows() {
            let [min, median, max] = [min, median, max].map(short);
            text.push_str(&format!("| {scenario} | {name} | {median} | {min} | {max} | {unit} | {runs} |\n"));
        }
        text
    }

    /// One JSON object for each figure.
    pub fn json(&self) -> Vec<Value> {
        self.rows()
            .map(|(scenario, name, unit, [min, median, max], runs)| {
                json!({
                    "event": "figure", "scenario": scenario, "figure": name, "unit": unit,
                    "median": median, "min": min, "max": max, "runs": runs,
                })
            })
            .collect()
    }
}

/// A number with about three digits that matter.
fn short(value: f64) -> String {
    match value.abs() {
        magnitude if magnitude >= 100_000.0 => format!("{:.0}k", value / 1000.0),
        magnitude if magnitude >= 1000.0 => format!("{:.2}k", value / 1000.0),
        magnitude if magnitude >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}
