// Small things that several views use.
import { html } from "htm/preact";

/** Text of others, which may run in any direction. */
export const Text = ({ of, none = "(no label)", class: kind = "" }) =>
  html`<bdi class=${kind} title=${of}>${of && of.trim() ? of : html`<span class="muted">${none}</span>`}</bdi>`;

export const HeatSwitch = ({ sae, on, change }) => sae.grid
  ? html`<label class="check"><input type="checkbox" checked=${Boolean(on)} onChange=${(e) => change(e.target.checked ? 1 : undefined)} />
      Heat map</label>`
  : html`<span class="muted" title="The features are averaged over the image, so where a latent fires is not known.">no heat maps</span>`;

export const HeatNote = () => html`<p class="note heat-note"><span class="heat-scale" aria-hidden="true" />
  Where the latent fires in the image, from weakly to its strongest place there; dark where it does not.</p>`;

export const Loading = () => html`<p class="muted" role="status">Loading…</p>`;
