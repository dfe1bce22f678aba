package xdp

import "time"

// Nap is for how long the first port's frames are left to the worker.
func Nap(d *Device) time.Duration { return d.ports[0].nap() }

// Unbind ends the first port's binding, as SetMemory and Recall do. Another is opened in the background.
func Unbind(d *Device) error {
	p := d.ports[0]
	p.control.Lock()
	defer p.control.Unlock()
	return p.shut(time.Now(), nil)
}
