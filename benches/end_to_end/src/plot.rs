//! The ratios of all drains, as bars.

use crate::report::Report;
use anyhow::{Result, anyhow};
use plotters::prelude::*;
use std::path::Path;

const WIDTH: u32 = 900;
const ROW: u32 = 28;

/// A bar for each measure that has a ratio: the median, and a line from the least to the greatest.
pub fn ratios(report: &Report, path: &Path) -> Result<()> {
    let bars: Vec<_> = report
        .measures
        .iter()
        .filter_map(|measured| Some((measured.name, measured.figure("ratio")?.spread)))
        .collect();
    let Some(top) = bars.iter().map(|(_, spread)| spread.max).reduce(f64::max) else { return Ok(()) };
    draw(&bars, top.max(1.0), path).map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

fn draw(
    bars: &[(&str, crate::stats::Spread)],
    top: f64,
    path: &Path,
) -> Result<(), Box<dyn std::error::Error>> {
    let height = ROW * (bars.len() as u32 + 3);
    let area = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption("rate, as a ratio to raw publishing in the same minutes", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(30)
        .y_label_area_size(140)
        .build_cartesian_2d(0.0..top * 1.05, (0..bars.len()).into_segmented())?;
    let name = |place: &SegmentValue<usize>| match place {
        SegmentValue::CenterOf(place) | SegmentValue::Exact(place) => {
            bars.get(*place).map_or_else(String::new, |(name, _)| (*name).to_owned())
        }
        SegmentValue::Last => String::new(),
    };
    chart.configure_mesh().disable_y_mesh().y_labels(bars.len()).y_label_formatter(&name).draw()?;
    for (place, (_, spread)) in bars.iter().enumerate() {
        let (low, high) = (SegmentValue::Exact(place), SegmentValue::Exact(place + 1));
        let mut bar = Rectangle::new([(0.0, low), (spread.median, high)], RGBColor(70, 120, 180).filled());
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
