// Package logsink keeps the log from holding up what is logged about: workers and sessions log with locks held, and whoever reads the log may be slow,
// gone, or a disk that is full; and a guest or a front-end that misbehaves at full rate must not fill that disk.
//
// # Theory of operation
//
//	slog.Logger -> Handler: a budget per message -> text or JSON -> Sink: a bounded queue -> goroutine -> standard error
//
// A Handler lets each message pass Burst times, and from then on Rate times a second; how many were held back shows as the attribute "suppressed" of the
// next one that passes. Each Logger that was made by With has budgets of its own, so that what one port has to say costs another nothing. Debug messages
// pass always: they are asked for.
//
// A Sink takes lines without ever waiting, up to Capacity bytes that are not written yet, and loses what is beyond. What is lost, there or because it
// could not be written, is counted, and told as soon as something can be written again.
package logsink

import (
	"context"
	"io"
	"log/slog"
	"sync"
	"time"
)

// Limits of the log.
const (
	Capacity = 1 << 20     // bytes of lines that are not written yet
	Burst    = 100         // times that a message passes at once
	Rate     = 1           // times a second that it passes in the long run
	Patience = time.Second // of Flush
)

// New returns a Logger that writes to w, in JSON or as text. Its lines are written by a goroutine, which lives as long as the process.
func New(w io.Writer, json bool, level slog.Leveler) *slog.Logger {
	s := &Sink{w: w, wake: make(chan struct{}, 1)}
	opts := &slog.HandlerOptions{Level: level}
	if json {
		s.format = slog.NewJSONHandler(s, opts)
	} else {
		s.format = slog.NewTextHandler(s, opts)
	}
	go s.run()
	return slog.New(&handler{Handler: s.format, sink: s, budgets: map[string]*budget{}, now: time.Now})
}

// Flush waits until all that was logged is written, but for no longer than Patience: what cannot be written by then is lost. A Logger that is not New's is
// left alone.
func Flush(log *slog.Logger) {
	if h, ok := log.Handler().(*handler); ok {
		h.sink.flush()
	}
}

// handler is a slog.Handler with budgets.
type handler struct {
	slog.Handler
	sink *Sink
	now  func() time.Time

	mu      sync.Mutex
	budgets map[string]*budget // by message, of which there are as many as the program has
}

// budget is what is left of a message's.
type budget struct {
	left       float64
	at         time.Time
	suppressed int
}

// Handle implements slog.Handler.
func (h *handler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelInfo {
		n, ok := h.spend(r.Message)
		if !ok {
			return nil
		}
		if n > 0 {
			r.AddAttrs(slog.Int("suppressed", n))
		}
	}
	return h.Handler.Handle(ctx, r)
}

// spend takes one message from its budget, and tells how many were held back before it.
func (h *handler) spend(message string) (suppressed int, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.now()
	b := h.budgets[message]
	if b == nil {
		b = &budget{left: Burst, at: now}
		h.budgets[message] = b
	}
	b.left = min(b.left+Rate*now.Sub(b.at).Seconds(), Burst)
	b.at = now
	if b.left < 1 {
		b.suppressed++
		return 0, false
	}
	b.left--
	suppressed, b.suppressed = b.suppressed, 0
	return suppressed, true
}

// with is h over another slog.Handler, with budgets of its own.
func (h *handler) with(inner slog.Handler) slog.Handler {
	return &handler{Handler: inner, sink: h.sink, now: h.now, budgets: map[string]*budget{}}
}

// WithAttrs implements slog.Handler.
func (h *handler) WithAttrs(a []slog.Attr) slog.Handler { return h.with(h.Handler.WithAttrs(a)) }

// WithGroup implements slog.Handler.
func (h *handler) WithGroup(name string) slog.Handler { return h.with(h.Handler.WithGroup(name)) }
