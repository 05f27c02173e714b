//! Results as SVG, drawn by hand: bars beside each other, and jitter over time, in files that any browser shows.

use std::fmt::Write as _;

use crate::bench::{Group, Results, Row, TripRow};
use crate::measure::Kind;

const KINDS: [(Kind, &str, &str); 3] = [
    (Kind::Linecard, "Linecard", "#0b6e4f"),
    (Kind::Ovs, "Open vSwitch", "#c8553d"),
    (Kind::Cable, "patch cable", "#888888"),
];

/// A quantile's name, colour and figure.
type Mark = (&'static str, &'static str, fn(&TripRow) -> f64);

/// Room of a drawing, in pixels.
const WIDTH: f64 = 860.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 48.0;
const HEIGHT: f64 = 260.0;
const BOTTOM: f64 = 40.0;

/// File names and drawings, of what was measured.
pub(super) fn plots(results: &Results) -> Vec<(&'static str, String)> {
    let of = |group: Group| -> Vec<&Row> { results.rows.iter().filter(|row| row.group == group).collect() };
    let mut plots = Vec::new();
    for (name, group, title) in [
        ("throughput.svg", Group::Forwarding, "VM to VM, one core: millions of frames per second"),
        ("ports.svg", Group::Ports, "Busy ports on one core, 64 B: millions of frames per second"),
        ("addresses.svg", Group::Addresses, "Addresses in the table, 64 B: millions of frames per second"),
    ] {
        let rows = of(group);
        if !rows.is_empty() {
            plots.push((name, bars(title, &rows)));
        }
    }
    if !results.trips.is_empty() {
        plots.push(("latency.svg", latency(&results.trips)));
        plots.push(("jitter.svg", jitter(&results.trips)));
    }
    plots
}

/// A bar for each switch and row, with a whisker over all rounds.
fn bars(title: &str, rows: &[&Row]) -> String {
    let top = rows.iter().flat_map(|row| row.turns.values().flatten()).fold(0.0, |top: f64, &figure| top.max(figure));
    let axis = Axis::linear(top);
    let mut svg = Drawing::new(title, TOP + HEIGHT + BOTTOM);
    svg.legend(KINDS.iter().map(|&(_, name, color)| (name, color)));
    svg.grid(&axis, TOP);
    let step = (WIDTH - LEFT - RIGHT) / rows.len() as f64;
    for (at, row) in rows.iter().enumerate() {
        let width = step * 0.8 / KINDS.len() as f64;
        for (nth, (kind, _, color)) in KINDS.into_iter().enumerate() {
            let Some(spread) = row.spread(kind) else { continue };
            let x = LEFT + step * (at as f64 + 0.1) + width * nth as f64;
            let [low, middle, high] = [spread.min, spread.median, spread.max].map(|figure| axis.y(figure, TOP));
            svg.rect(x, middle, width * 0.9, TOP + HEIGHT - middle, color);
            svg.line([x + width * 0.45, low], [x + width * 0.45, high], "#222222");
        }
        svg.text(LEFT + step * (at as f64 + 0.5), TOP + HEIGHT + 18.0, "middle", 12, &row.name);
    }
    svg.end()
}

/// Median, p99, p99.9 and longest of each switch, for each work, on a logarithmic axis.
fn latency(rows: &[TripRow]) -> String {
    let marks: [Mark; 4] = [
        ("median", "#0b6e4f", |row| row.median),
        ("p99", "#e0a030", |row| row.p99),
        ("p99.9", "#c8553d", |row| row.p999),
        ("max", "#888888", |row| row.max),
    ];
    let works = works(rows);
    let mut svg = Drawing::new("Round trip A to B to A, microseconds", works.len() as f64 * (HEIGHT + TOP + BOTTOM));
    svg.legend(marks.iter().map(|&(name, color, _)| (name, color)));
    for (panel, work) in works.iter().enumerate() {
        let rows: Vec<_> = rows.iter().filter(|row| row.work == *work).collect();
        let (y, axis) = (TOP + panel as f64 * (HEIGHT + TOP + BOTTOM), Axis::of_trips(&rows));
        svg.text(LEFT, y - 6.0, "start", 13, work);
        svg.grid(&axis, y);
        let step = (WIDTH - LEFT - RIGHT) / rows.len() as f64;
        for (at, row) in rows.iter().enumerate() {
            let x = LEFT + step * (at as f64 + 0.5);
            for (_, color, figure) in marks {
                let height = axis.y(figure(row), y);
                svg.rect(x - 22.0, height - 2.0, 44.0, 4.0, color);
            }
            svg.text(x, y + HEIGHT + 18.0, "middle", 12, &row.who);
        }
    }
    svg.end()
}

/// Each switch's round trips over time: the range of each span, and its median.
fn jitter(rows: &[TripRow]) -> String {
    let works = works(rows);
    let mut svg =
        Drawing::new("Jitter: range and median over time, microseconds", works.len() as f64 * (HEIGHT + TOP + BOTTOM));
    for (panel, work) in works.iter().enumerate() {
        let rows: Vec<_> = rows.iter().filter(|row| row.work == *work).collect();
        let (y, axis) = (TOP + panel as f64 * (HEIGHT + TOP + BOTTOM), Axis::of_trips(&rows));
        svg.text(LEFT, y - 6.0, "start", 13, work);
        svg.grid(&axis, y);
        let step = (WIDTH - LEFT - RIGHT) / rows.len() as f64;
        for (at, row) in rows.iter().enumerate() {
            let start = LEFT + step * at as f64 + 4.0;
            let each = (step - 8.0) / row.jitter.len().max(1) as f64;
            let color = KINDS.iter().find(|(kind, ..)| *kind == row.kind).map_or("#000000", |&(_, _, color)| color);
            let at = |nth: usize| start + each * nth as f64;
            let (mut ranges, mut medians) = (String::new(), String::new());
            for (nth, &[low, median, high]) in row.jitter.iter().enumerate() {
                let [low, median, high] = [low, median, high].map(|figure| axis.y(figure, y));
                // Writing to a String does not fail.
                let _ = write!(ranges, "M{:.1} {low:.1}V{high:.1}", at(nth));
                let _ = write!(medians, "M{:.1} {median:.1}h1.5", at(nth));
            }
            svg.path(&ranges, color);
            svg.path(&medians, "#000000");
            svg.text(start + (step - 8.0) / 2.0, y + HEIGHT + 18.0, "middle", 12, &row.who);
        }
    }
    svg.end()
}

fn works(rows: &[TripRow]) -> Vec<&str> {
    let mut works: Vec<_> = rows.iter().map(|row| row.work.as_str()).collect();
    works.dedup();
    works
}

/// From figures to heights.
#[derive(Debug)]
struct Axis {
    ticks: Vec<f64>,
    logarithmic: bool,
}

impl Axis {
    /// From nothing to a little over `top`, in round steps.
    fn linear(top: f64) -> Self {
        let rough = (top / 5.0).max(1e-9);
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|step| step * power).find(|&step| step >= rough);
        let step = step.unwrap_or(rough);
        let count = (top / step).ceil().max(1.0) as usize;
        Self { ticks: (0..=count).map(|tick| tick as f64 * step).collect(), logarithmic: false }
    }

    /// Whole decades around all figures.
    fn of_trips(rows: &[&TripRow]) -> Self {
        let low = rows.iter().map(|row| row.median).fold(f64::INFINITY, f64::min).max(0.1);
        let high = rows.iter().map(|row| row.max).fold(low, f64::max);
        // Jitter's lowest points lie under the median.
        let (first, last) = ((low / 2.0).log10().floor() as i32, high.log10().ceil() as i32);
        Self { ticks: (first..=last.max(first + 1)).map(|power| 10f64.powi(power)).collect(), logarithmic: true }
    }

    /// The height of `figure` in a panel that begins at `top`.
    fn y(&self, figure: f64, top: f64) -> f64 {
        let scale = |figure: f64| if self.logarithmic { figure.max(1e-9).log10() } else { figure };
        let (low, high) = (scale(self.ticks[0]), scale(self.ticks[self.ticks.len() - 1]));
        let part = (scale(figure) - low) / (high - low);
        top + HEIGHT * (1.0 - part.clamp(0.0, 1.0))
    }
}

/// An SVG that grows.
struct Drawing(String);

impl Drawing {
    fn new(title: &str, height: f64) -> Self {
        let mut this = Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" \
             height=\"{height:.0}\" font-family=\"sans-serif\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        ));
        this.text(LEFT, 18.0, "start", 15, title);
        this
    }

    fn legend<'a>(&mut self, names: impl Iterator<Item = (&'a str, &'a str)>) {
        for (nth, (name, color)) in names.enumerate() {
            let x = WIDTH - 440.0 + 110.0 * nth as f64;
            self.rect(x, 26.0, 10.0, 10.0, color);
            self.text(x + 14.0, 35.0, "start", 12, name);
        }
    }

    fn grid(&mut self, axis: &Axis, top: f64) {
        for &tick in &axis.ticks {
            let y = axis.y(tick, top);
            self.line([LEFT, y], [WIDTH - RIGHT, y], "#dddddd");
            self.text(LEFT - 6.0, y + 4.0, "end", 11, &format!("{}", (tick * 1e6).round() / 1e6));
        }
    }

    // Writing to a String does not fail.
    fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, color: &str) {
        let _ = writeln!(
            self.0,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{color}\"/>"
        );
    }

    fn line(&mut self, [x1, y1]: [f64; 2], [x2, y2]: [f64; 2], color: &str) {
        let _ =
            writeln!(self.0, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{color}\"/>");
    }

    fn path(&mut self, steps: &str, color: &str) {
        let _ = writeln!(self.0, "<path d=\"{steps}\" stroke=\"{color}\" fill=\"none\"/>");
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, size: u32, text: &str) {
        let _ = writeln!(
            self.0,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\">{text}</text>"
        );
    }

    fn end(self) -> String {
        self.0 + "</svg>\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_steps_and_hold_everything() {
        assert_eq!(Axis::linear(23.0).ticks, [0.0, 5.0, 10.0, 15.0, 20.0, 25.0]);
        let axis = Axis::linear(23.0);
        assert_eq!((axis.y(0.0, 10.0), axis.y(25.0, 10.0)), (10.0 + HEIGHT, 10.0));
        assert!(axis.y(23.0, 10.0) > 10.0);
    }
}
