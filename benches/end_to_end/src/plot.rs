//! The pictures of a run, drawn of its `results.json`, so that a kept run can be drawn again.

use crate::report::JSON;
use crate::stats::Spread;
use anyhow::{Context, Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{SegmentedCoord, ValueFormatter};
use plotters::coord::types::RangedCoordusize;
use plotters::prelude::*;
use serde::Deserialize;
use std::error::Error;
use std::path::{Path, PathBuf};

/// All there may be: a run without a ratio, or without a latency, lacks that one.
pub const PLOTS: [&str; 2] = ["ratios.svg", "latencies.svg"];

const WIDTH: u32 = 900;
const ROW: u32 = 28;
const BLUE: RGBColor = RGBColor(70, 120, 180);
/// From left to right on a line.
const PERCENTILES: [(&str, RGBColor); 4] = [
    ("commit to consumer, p50", BLUE),
    ("commit to consumer, p95", RGBColor(230, 150, 40)),
    ("commit to consumer, p99", RGBColor(190, 50, 50)),
    ("commit to consumer, max", BLACK),
];

/// Of `results.json` what a picture shows.
#[derive(Deserialize)]
struct Results {
    measures: Vec<Measured>,
}

#[derive(Deserialize)]
struct Measured {
    name: String,
    figures: Vec<Figure>,
}

/// Not a flattened [`Spread`]: built together with the relay, `serde_json` keeps numbers of any length, and those cannot be
/// flattened.
#[derive(Deserialize)]
struct Figure {
    name: String,
    /// `null` where it is no number.
    median: Option<f64>,
    min: Option<f64>,
    max: Option<f64>,
}

/// Medians from left to right, with their colours.
type Dots = Vec<(f64, RGBColor)>;

impl Measured {
    fn spread(&self, name: &str) -> Option<Spread> {
        let &Figure { median, min, max, .. } = self.figures.iter().find(|figure| figure.name == name)?;
        Some(Spread { median: median?, min: min?, max: max? })
    }

    fn ratio(&self) -> Option<Spread> {
        self.spread("ratio")
    }

    /// Empty is none.
    fn percentiles(&self) -> Option<Dots> {
        let dot = |(name, colour)| Some((self.spread(name)?.median, colour));
        let dots: Dots = PERCENTILES.into_iter().filter_map(dot).collect();
        (!dots.is_empty()).then_some(dots)
    }
}

impl Results {
    /// Of each measure that has this: its name, and this.
    fn of<T>(&self, what: impl Fn(&Measured) -> Option<T>) -> Vec<(&str, T)> {
        let rows =
            self.measures.iter().filter_map(|measured| Some((measured.name.as_str(), what(measured)?)));
        // Places count from the bottom, and the first shall be at the top.
        rows.rev().collect()
    }
}

/// Draws what the folder's results have, and says where.
pub fn draw(dir: &Path) -> Result<Vec<PathBuf>> {
    let source = dir.join(JSON);
    let read = || anyhow::Ok(serde_json::from_slice::<Results>(&std::fs::read(&source)?)?);
    let results = read().with_context(|| format!("cannot read {}", source.display()))?;
    let ratios = results.of(Measured::ratio);
    let latencies = results.of(Measured::percentiles);
    let [bars, dots] = PLOTS.map(|name| dir.join(name));
    let failed = |path: &Path, error: Box<dyn Error>| anyhow!("cannot draw {}: {error}", path.display());
    let mut drawn = Vec::new();
    if !ratios.is_empty() {
        draw_ratios(&ratios, &bars).map_err(|error| failed(&bars, error))?;
        drawn.push(bars);
    }
    if !latencies.is_empty() {
        draw_latencies(&latencies, &dots).map_err(|error| failed(&dots, error))?;
        drawn.push(dots);
    }
    Ok(drawn)
}

/// A bar for each measure: the median, and a line from the least to the greatest.
fn draw_ratios(bars: &[(&str, Spread)], path: &Path) -> Result<(), Box<dyn Error>> {
    let top = bars.iter().map(|(_, spread)| spread.max).fold(1.0, f64::max);
    let names: Vec<_> = bars.iter().map(|(name, _)| *name).collect();
    let area = area(path, bars.len())?;
    let mut chart = chart(&area, "rate, as a ratio to raw publishing in the same minutes")
        .build_cartesian_2d(0.0..top * 1.05, (0..bars.len()).into_segmented())?;
    mesh(&mut chart, &names)?;
    for (place, (_, spread)) in bars.iter().enumerate() {
        let (low, high) = (SegmentValue::Exact(place), SegmentValue::Exact(place + 1));
        let mut bar = Rectangle::new([(0.0, low), (spread.median, high)], BLUE.filled());
        bar.set_margin(5, 5, 0, 0);
        chart.draw_series([bar])?;
        let middle = SegmentValue::CenterOf(place);
        let range =
            PathElement::new([(spread.min, middle.clone()), (spread.max, middle)], BLACK.stroke_width(2));
        chart.draw_series([range])?;
    }
    area.present()?;
    Ok(())
}

/// A line for each measure, with a dot for the median of each percentile.
fn draw_latencies(lines: &[(&str, Dots)], path: &Path) -> Result<(), Box<dyn Error>> {
    let medians = || lines.iter().flat_map(|(_, dots)| dots).map(|(median, _)| *median);
    let (least, greatest) = (medians().fold(1.0, f64::min), medians().fold(1.0, f64::max));
    let names: Vec<_> = lines.iter().map(|(name, _)| *name).collect();
    let area = area(path, lines.len())?;
    let mut chart = chart(
        &area,
        "commit to consumer in ms: p50, p95, p99 and longest, medians of the rounds; logarithmic",
    )
    .build_cartesian_2d((least * 0.8..greatest * 1.25).log_scale(), (0..lines.len()).into_segmented())?;
    mesh(&mut chart, &names)?;
    for (place, (_, dots)) in lines.iter().enumerate() {
        let at = |median: f64| (median, SegmentValue::CenterOf(place));
        let line: Vec<_> = dots.iter().map(|(median, _)| at(*median)).collect();
        chart.draw_series([PathElement::new(line, BLACK.stroke_width(1))])?;
        chart
            .draw_series(dots.iter().map(|(median, colour)| Circle::new(at(*median), 5, colour.filled())))?;
    }
    area.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Rows = SegmentedCoord<RangedCoordusize>;

fn area(path: &Path, rows: usize) -> Result<Area<'_>, Box<dyn Error>> {
    let area = SVGBackend::new(path, (WIDTH, ROW * (u32::try_from(rows)? + 3))).into_drawing_area();
    area.fill(&WHITE)?;
    Ok(area)
}

fn chart<'a, 'b>(area: &'a Area<'b>, caption: &str) -> ChartBuilder<'a, 'b, SVGBackend<'b>> {
    let mut chart = ChartBuilder::on(area);
    chart.caption(caption, ("sans-serif", 18)).margin(12).x_label_area_size(30).y_label_area_size(140);
    chart
}

/// Lines for the numbers, and a name at each row.
fn mesh<'a, X>(
    chart: &mut ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, Rows>>,
    names: &[&str],
) -> Result<(), Box<dyn Error>>
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let name = |place: &SegmentValue<usize>| match place {
        SegmentValue::CenterOf(place) | SegmentValue::Exact(place) => {
            names.get(*place).map_or_else(String::new, |name| (*name).to_owned())
        }
        SegmentValue::Last => String::new(),
    };
    let mut mesh = chart.configure_mesh();
    // Without a size of its own the letters shrink with the rows.
    mesh.label_style(("sans-serif", 12)).disable_y_mesh();
    mesh.y_labels(names.len()).y_label_formatter(&name).draw()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn measured(name: &str, figures: &[&str]) -> Value {
        let figure = |name: &&str| json!({"name": name, "unit": "", "median": 2.5, "min": 0.5, "max": 40.0});
        json!({"name": name, "figures": figures.iter().map(figure).collect::<Vec<_>>()})
    }

    /// What is drawn of these measures: each picture's text, empty where there is none.
    fn drawn(measures: &[Value]) -> [String; 2] {
        let dir = std::env::temp_dir().join(format!("plot-{}-{}", std::process::id(), measures.len()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(JSON), json!({ "measures": measures }).to_string()).unwrap();
        draw(&dir).unwrap();
        let pictures = PLOTS.map(|name| std::fs::read_to_string(dir.join(name)).unwrap_or_default());
        std::fs::remove_dir_all(&dir).unwrap();
        pictures
    }

    #[test]
    fn a_run_is_drawn_by_what_it_has() {
        let percentiles = PERCENTILES.map(|(name, _)| name);
        let (drain, latency) = (measured("a-drain", &["rate", "ratio"]), measured("late", &percentiles));
        let [ratios, latencies] = drawn(std::slice::from_ref(&drain));
        assert!(ratios.contains("a-drain") && latencies.is_empty(), "{ratios}{latencies}");
        let [ratios, latencies] = drawn(&[drain, latency]);
        assert!(ratios.contains("a-drain") && !ratios.contains("late"), "{ratios}");
        assert!(latencies.contains("late") && !latencies.contains("a-drain"), "{latencies}");
        let no_number =
            json!({"name": "odd", "figures": [{"name": "ratio", "median": null, "min": 1.0, "max": null}]});
        assert_eq!(drawn(&[no_number]), ["", ""], "there is nothing to draw");
        assert_eq!(drawn(&[]), ["", ""], "nothing was measured");
    }

    #[test]
    fn results_that_cannot_be_read_are_named() {
        let error = format!("{:#}", draw(Path::new("/nowhere")).unwrap_err());
        assert!(error.starts_with("cannot read /nowhere/results.json: "), "{error}");
    }
}
